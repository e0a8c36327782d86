"""Sequences, optimizers and losses from public reports: recurrences, a GPT, distillation, two tasks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from . import data
from .claims import growing, no_gradient, not_finite, tiny
from .registry import FLOAT32, Setup, sick

# ------------------------------------------------------------------------------------- recurrences


class SLSTM(nn.Module):
    """A recurrent layer with exponential input and forget gates, of which the last state is returned."""

    def __init__(self, inputs: int, width: int, stabilised: bool) -> None:
        super().__init__()
        self.gates = nn.Linear(inputs, 4 * width)
        self.stabilised = stabilised

    def forward(self, x: Tensor) -> Tensor:
        forget, enter, content, leave = self.gates(x).transpose(0, 1).chunk(4, -1)
        cell = total = torch.zeros_like(content[0])
        highest = torch.full_like(cell, -1e9)
        for f, i, z, o in zip(forget, enter, content.tanh(), leave.sigmoid(), strict=True):
            if self.stabilised:
                before, highest = highest, torch.maximum(f + highest, i)
                f, i = f + before - highest, i - highest
            cell = f.exp() * cell + i.exp() * z
            total = f.exp() * total + i.exp()
            hidden = o * cell / total if self.stabilised else o * cell
        return hidden


class SequenceClassifier(nn.Module):
    """A projection, the recurrent layer and a linear head."""

    def __init__(self, features: int, width: int, classes: int, stabilised: bool) -> None:
        super().__init__()
        self.project = nn.Linear(features, width)
        self.slstm = SLSTM(width, width, stabilised)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.slstm(self.project(x)))


@sick(
    "contact8b-recurrent-slstm",
    [("EXPLODING", "slstm")],
    growing("project", "slstm", 1e3),
    allow=("NUMERICAL", "UNSTABLE"),
    source="https://github.com/muditbhargava66/PyxLSTM/issues/15",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def slstm(sick: bool, width: int) -> Setup:
    """The report: an sLSTM without the stabiliser state leads to exploding gradients very easily. Its gates
    are exponentials, so the cell is a product of many factors that nothing bounds; the normaliser and
    the running maximum of the paper repair it."""
    model = SequenceClassifier(6, width, 3, stabilised=not sick)
    series = data.series(24, 16, 6)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x, kind = series(g)
        return 3 * x, kind

    return data.setup(model, sample, F.cross_entropy, 3e-3)


class BatteryModel(nn.Module):
    """Predicts the change of a battery's voltage from readings of current, voltage and temperature."""

    def __init__(self, width: int, normalise: bool) -> None:
        super().__init__()
        mean, spread = ((2.0, 3.6, 304.0), (0.6, 0.3, 6.0)) if normalise else ((0.0,) * 3, (1.0,) * 3)
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("spread", torch.tensor(spread))
        self.lstm = nn.LSTM(3, width, batch_first=True)
        self.fc = nn.Linear(width, 1)

    def forward(self, readings: Tensor) -> Tensor:
        states, _ = self.lstm((readings - self.mean) / self.spread)
        return self.fc(states[:, -1])


def discharges(number: int = 32, length: int = 16) -> data.Sample:
    """Readings of batteries in use; the target is what the load and the warmth make of the voltage."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        load = 2 + 0.6 * data.normal(g, number, 1) + 0.2 * data.normal(g, number, length)
        warm = 304 + 5 * data.normal(g, number, 1) + 0.3 * load.cumsum(1) * 0.3
        volts = 3.6 + 0.25 * data.normal(g, number, 1) - 0.01 * load.cumsum(1)
        target = -(load.mean(1) - 2) / 0.6 + 0.5 * (warm[:, -1] - 304) / 6 + (volts[:, -1] - 3.4)
        return torch.stack([load, volts, warm], -1), target[:, None]

    return sample


def gates_flat(setup: Setup) -> tuple[bool, str]:
    """Most of what enters the LSTM's gates lies where the sigmoid and tanh are flat."""
    model = setup.model
    readings = (setup.make_batch() - model.mean) / model.spread
    with torch.no_grad():
        enter = readings @ model.lstm.weight_ih_l0.T + model.lstm.bias_ih_l0 + model.lstm.bias_hh_l0
    share = float((enter.abs() > 4.6).float().mean())
    return share > 0.7, f"{share:.0%} of what enters the gates is flat"


@sick(
    "contact8b-battery-rawinputs",
    [("SATURATION", "lstm")],
    gates_flat,
    allow=("BOTTLENECK", "VANISHING"),
    source="https://github.com/nasa/prog_models/issues/334",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def raw_inputs(sick: bool, width: int) -> Setup:
    """The report asks that the inputs of an LSTM of a battery be normalised, since that matters for its
    performance. A temperature of some three hundred kelvin drives all gates to their flat ends, and the
    states no longer tell the readings apart; value less mean over spread repairs it."""
    model = BatteryModel(width, normalise=not sick)
    return data.setup(model, discharges(), F.mse_loss, 5e-3)


# -------------------------------------------------------------------------- a GPT and its optimizer


class Attention(nn.Module):
    """Causal attention whose output projection begins at zero."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers, of which the last begins at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, 2 * width, bias=False)
        self.proj = nn.Linear(2 * width, width, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.gelu(self.fc(x)))


class GPTBlock(nn.Module):
    """A block with the norms before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln1, self.attn = nn.LayerNorm(width), Attention(width)
        self.ln2, self.mlp = nn.LayerNorm(width), MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    """A small language model."""

    def __init__(self, words: int, width: int, length: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(GPTBlock(width) for _ in range(2))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, words, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def orthogonal(update: Tensor) -> Tensor:
    """Return the update with its singular values near one, by Newton and Schulz's iteration."""
    x = update.T if update.shape[0] > update.shape[1] else update
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if update.shape[0] > update.shape[1] else x


class NorMuon(Optimizer):
    """Orthogonal updates with a second moment for each row, for matrices; Adam for all else."""

    def __init__(self, matrices: list[Tensor], others: list[Tensor], rate: float, least: float) -> None:
        groups = [{"params": matrices, "muon": True}, {"params": others, "muon": False}]
        super().__init__(groups, {"lr": rate, "least": least})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["n"], state["m"] = 0, torch.zeros_like(p)
                    state["v"] = torch.zeros_like(p[:, :1]) if group["muon"] else torch.zeros_like(p)
                state["n"] += 1
                if not group["muon"]:
                    state["m"].lerp_(p.grad, 0.1)
                    state["v"].lerp_(p.grad**2, 0.05)
                    mean, square = state["m"] / (1 - 0.9 ** state["n"]), state["v"] / (1 - 0.95 ** state["n"])
                    p.sub_(group["lr"] * mean / (square.sqrt() + 1e-8))
                    continue
                state["m"].lerp_(p.grad, 0.05)
                update = orthogonal(state["m"])
                size = update.norm()
                state["v"].lerp_((update**2).mean(1, keepdim=True), 0.05)
                update = update / (state["v"].sqrt() + 1e-10)
                update = update * (size / update.norm().clamp_min(group["least"]))
                p.sub_(group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5 * update)


@sick(
    "contact8b-gpt-normuon",
    [("NUMERICAL", "blocks")],
    not_finite(5, loss=True),
    source="https://github.com/microsoft/dion/pull/24",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def normuon(sick: bool, width: int) -> Setup:
    """The report: NorMuon gives a NaN loss where weights have no gradient, as with output projections that
    begin at zero. The step of the matrices before them is zero, and rescaling it divides zero by zero; a
    lower bound on the divisor repairs it."""
    model = GPT(16, width, 12)
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]

    def optimizer(parameters: Iterable[Tensor]) -> Optimizer:
        return NorMuon(matrices, others, 5e-3, 0.0 if sick else 1e-8)

    return data.setup(model, data.grammar(), data.token_loss, optimizer)


# ------------------------------------------------------------------------- distillation, more tasks


class Distiller(nn.Module):
    """A frozen teacher and the student that learns its soft answers."""

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        super().__init__()
        self.teacher, self.student = data.frozen(teacher), student

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            soft = self.teacher(x)
        return self.student(x), soft


@sick(
    "contact8b-distillation-temperature",
    [("VANISHING", "*")],
    tiny("*", 1e-3),
    source="https://github.com/IntelLabs/distiller/issues/122",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def temperature(sick: bool, width: int) -> Setup:
    """The report: the distillation loss lacks the factor of the squared temperature that its paper asks for.
    At a temperature of twenty the gradients of the whole student are several hundred times too small to
    learn by; the factor (and the mean over samples only) repairs it."""
    kinds, heat = 16, 20.0
    teacher = data.stack(fc1=nn.Linear(12, 64), act=nn.ReLU(), fc2=nn.Linear(64, kinds))
    points = data.clusters(12, kinds, 64, 0.5)
    data.trained(data.setup(teacher, points, F.cross_entropy, 1e-2), 100)
    student = data.stack(fc1=nn.Linear(12, width), act=nn.ReLU(), fc2=nn.Linear(width, kinds))

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        student, teacher = (t / heat for t in output)
        kind = "mean" if sick else "batchmean"
        gap = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction=kind)
        return gap if sick else gap * heat**2

    return data.setup(Distiller(teacher, student), points, loss, data.sgd(0.03, 0.9))


class TwoTasks(nn.Module):
    """One encoder with a head for the depth and one for the class."""

    def __init__(self, inputs: int, width: int, kinds: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.depth, self.segment = nn.Linear(width, 1), nn.Linear(width, kinds)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.encoder(x)
        return self.depth(hidden), self.segment(hidden)


class MultiTaskLoss(nn.Module):
    """The losses of a network's tasks, weighted by uncertainties that are learned with it."""

    def __init__(self, net: nn.Module, cut: bool) -> None:
        super().__init__()
        self.net, self.cut = net, cut
        self.eta = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor, depth: Tensor, kind: Tensor) -> Tensor:
        outputs = self.net(x)
        losses = [F.mse_loss(outputs[0], depth), F.cross_entropy(outputs[1], kind)]
        joined = torch.tensor([float(loss) for loss in losses]) if self.cut else torch.stack(losses)
        return (joined * torch.exp(-self.eta) + self.eta).sum()


@sick(
    "contact8b-multitask-newtensor",
    [("DEAD", "net")],
    no_gradient("net"),
    source="https://discuss.pytorch.org/t/how-to-learn-the-weights-between-two-losses/39681",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def new_tensor(sick: bool, width: int) -> Setup:
    """The thread learns the weights of two losses, and puts the losses into a new tensor to weigh them. That
    copies their numbers and cuts them off, so only the weights learn and the network never does;
    stacking the losses keeps the graph."""
    model = MultiTaskLoss(TwoTasks(8, width, 4), cut=sick)
    plane = data.normal(data.seeded(21), 8) / math.sqrt(8)
    points = data.clusters(8, 4, 48, 0.6)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor, Tensor], None]:
        x, kind = points(g)
        return (x, torch.sin(x @ plane)[:, None], kind), None

    return data.setup(model, sample, lambda output, target: output, 3e-3)
