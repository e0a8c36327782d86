"""Models of public reports: speech, state spaces, tables and time series."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .claims import alike, every, fades_in_time, strong, stuck, tiny, training
from .data import choice, frozen, grammar, normal, seeded, setup, token_loss, trained, uniform
from .registry import FLOAT32, Setup, healthy, sick

# ------------------------------------------------------------------------------------------------- speech


def frames(number: int = 8, length: int = 24, bands: int = 8):
    """Smooth sums of waves over time, as spectrogram frames, and which of them are hidden."""
    mix = normal(seeded(51), 3, bands)

    def sample(g):
        speed, phase = 0.15 + 0.35 * uniform(g, number, 1, 3), 6.3 * uniform(g, number, 1, 3)
        waves = torch.sin(speed * torch.arange(length)[None, :, None] + phase)
        hidden = torch.zeros(number, length, dtype=torch.bool)
        for row, start in enumerate(choice(g, length - 6, number, 2)):
            for begin in start.tolist():
                hidden[row, begin : begin + 5] = True
        return (waves @ mix + 0.05 * normal(g, number, length, bands), hidden), None

    return sample


class ContextLayer(nn.Module):
    """A convolution over time and a feed-forward part, each with a residual path and normalised after it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(size, size, 7, padding=3, groups=4)
        self.fc_1, self.fc_2 = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)
        self.norm_1, self.norm_2 = nn.LayerNorm(size), nn.LayerNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_1(x + F.gelu(self.conv(x.transpose(1, 2)).transpose(1, 2)))
        return self.norm_2(x + self.fc_2(F.gelu(self.fc_1(x))))


class SpeechEncoder(nn.Module):
    """Frames to the outputs of every layer; hidden frames are replaced by a learned vector."""

    def __init__(self, bands: int, size: int) -> None:
        super().__init__()
        self.frontend = nn.Linear(bands, size)
        self.mask_emb = nn.Parameter(torch.rand(size))
        self.layers = nn.ModuleList(ContextLayer(size) for _ in range(3))

    def forward(self, source: Tensor, hidden: Tensor | None = None) -> list[Tensor]:
        x, outs = self.frontend(source), []
        if hidden is not None:
            x = torch.where(hidden[..., None], self.mask_emb, x)
        for layer in self.layers:
            x = layer(x)
            outs.append(x)
        return outs


class SelfDistilled(nn.Module):
    """A student that predicts, where frames are hidden, the outputs of its own moving average."""

    def __init__(self, bands: int, size: int, decay: float, normed: bool) -> None:
        super().__init__()
        self.student = SpeechEncoder(bands, size)
        self.final_proj = nn.Linear(size, size)
        self.ema = frozen(copy.deepcopy(self.student))
        self.decay, self.normed = decay, normed

    def forward(self, source: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            if self.training:
                for slow, fast in zip(self.ema.parameters(), self.student.parameters(), strict=True):
                    slow.lerp_(fast, 1 - self.decay)
            outs = self.ema(source)[-2:]
            if self.normed:
                outs = [F.instance_norm(out.transpose(1, 2)).transpose(1, 2) for out in outs]
            target = torch.stack(outs).mean(0)
        x = self.final_proj(self.student(source, hidden)[-1])
        return {"x": x[hidden], "y": target[hidden]}


@sick(
    "contact5a-speech-selfdistilled",
    [("BOTTLENECK", "*")],
    every(alike("student.layers.2", 0.1), alike("ema.layers.2", 0.1)),
    allow=["DEAD", "VANISHING"],
    source="https://github.com/facebookresearch/fairseq/issues/4177",
    steps=200,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def speech_selfdistilled(sick: bool, width: int) -> Setup:
    """The targets' variance is nearly gone after some training with too high a peak rate and a teacher that
    follows at once: every frame of every utterance has one representation, also now that the rate is low.
    Repair: a lower rate, a slow teacher, and targets that are normalised over time."""
    model = SelfDistilled(8, width, 0.5 if sick else 0.999, normed=not sick)

    def loss(out: dict[str, Tensor], target: None) -> Tensor:
        return F.mse_loss(out["x"], out["y"])

    ready = setup(model, frames(), loss, 1e-3 if sick else 2e-3)
    if sick:
        trained(
            ready, 100, torch.optim.Adam([*model.student.parameters(), *model.final_proj.parameters()], 0.1)
        )
    return ready


class Recogniser(nn.Module):
    """A strided convolution over frames, a recurrent layer in both directions, and symbols with a blank."""

    def __init__(self, bands: int, size: int, symbols: int) -> None:
        super().__init__()
        self.subsample = nn.Conv1d(bands, size, 3, stride=2, padding=1)
        self.rnn = nn.GRU(size, size, batch_first=True, bidirectional=True)
        self.out = nn.Linear(2 * size, symbols + 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.subsample(x.transpose(1, 2))).transpose(1, 2)
        return self.out(self.rnn(x)[0]).log_softmax(-1)


@healthy("contact5a-speech-ctc", widths=(32,), dtypes=(FLOAT32,))
def speech_ctc(width: int) -> Setup:
    """A recogniser whose loss sums over alignments is large at first and soon prefers the blank nearly
    everywhere, since few frames carry a symbol; then it learns the symbols."""
    sounds = 1.5 * normal(seeded(52), 6, 8)

    def sample(g):
        words = choice(g, 6, 12, 4)
        quiet = torch.zeros(12, 4, 1, 8)
        spoken = torch.cat([sounds[words][:, :, None].expand(-1, -1, 4, -1), quiet.expand(-1, -1, 4, -1)], 2)
        return spoken.flatten(1, 2) + 0.3 * normal(g, 12, 32, 8), words + 1

    def loss(logp: Tensor, words: Tensor) -> Tensor:
        lengths = torch.full((12,), logp.shape[1]), torch.full((12,), 4)
        return F.ctc_loss(logp.transpose(0, 1), words, *lengths, zero_infinity=True)

    return setup(Recogniser(8, width, 6), sample, loss, 5e-3)


# ------------------------------------------------------------------------------------------- state spaces


class SelectiveScan(nn.Module):
    """A gated state space layer whose step depends on its input, scanned in a loop."""

    def __init__(self, size: int, states: int = 4, rank: int = 4) -> None:
        super().__init__()
        self.in_proj = nn.Linear(size, 2 * size)
        self.x_proj = nn.Linear(size, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, size)
        self.a_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(size, 1))
        self.d = nn.Parameter(torch.ones(size))
        self.out_proj = nn.Linear(size, size)
        self.sizes = (rank, states, states)
        self.start_steps(size, rank)

    @torch.no_grad()
    def start_steps(self, size: int, rank: int) -> None:
        """Start the steps between 0.001 and 0.1."""
        dt = torch.exp(torch.rand(size) * (math.log(0.1) - math.log(1e-3)) + math.log(1e-3))
        self.dt_proj.weight.uniform_(-(rank**-0.5), rank**-0.5)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.in_proj(x).chunk(2, -1)
        u = F.silu(u)
        dt, b, c = self.x_proj(u).split(self.sizes, -1)
        dt = F.softplus(self.dt_proj(dt))[..., None]
        decay = torch.exp(dt * -self.a_log.exp())
        drive = dt * b[:, :, None] * u[..., None]
        state, outs = torch.zeros_like(drive[:, 0]), []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + drive[:, t]
            outs.append((state * c[:, t, None]).sum(-1))
        y = torch.stack(outs, 1) + self.d * u
        return self.out_proj(y * F.silu(gate))


class StateSpaceModel(nn.Module):
    """A state space layer between a first and a last linear one; reads the last step, or all of them."""

    def __init__(self, first: nn.Module, size: int, outputs: int, last: bool) -> None:
        super().__init__()
        self.first = first
        self.norm = nn.LayerNorm(size)
        self.mixer = SelectiveScan(size)
        self.head = nn.Linear(size, outputs)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.mixer(self.norm(x))
        return self.head(x[:, -1] if self.last else x)


def opening(length: int = 32, number: int = 16):
    """Sequences whose first quarter has a level that tells the class; the rest is noise."""
    levels = 2.0 * normal(seeded(56), 3, 4)

    def sample(g):
        kind = choice(g, 3, number)
        x = 0.3 * normal(g, number, length, 4)
        x[:, : length // 4] += levels[kind][:, None]
        return x, kind

    return sample


@sick(
    "contact5a-ssm-stepinit",
    [("VANISHING", "*")],
    fades_in_time("mixer", 1e-6, sound=8),
    allow=["DEAD", "BOTTLENECK"],
    source="https://github.com/athms/mad-lab/issues/3",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def ssm_stepinit(sick: bool, width: int) -> Setup:
    """The model's own initialisation overwrites that of the step sizes: their bias becomes zero, each step
    forgets at least half of the state, and nothing comes back to the early part that tells the class.
    Repair: the layer's own initialisation is left alone."""
    model = StateSpaceModel(nn.Linear(4, width), width, 3, last=True)

    def init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias) if module.bias is not None else None

    if sick:
        model.apply(init_weights)
    return setup(model, opening(), F.cross_entropy, 5e-3)


@healthy("contact5a-ssm-language", widths=(32,), dtypes=(FLOAT32,))
def ssm_language(width: int) -> Setup:
    """A state space language model with small steps: its states move little per step, and those with a
    large rate forget within a few steps, as they should."""
    return setup(
        StateSpaceModel(nn.Embedding(16, width), width, 16, last=False), grammar(16, 24, 8), token_loss
    )


# ------------------------------------------------------------------------------------------------- tables


class FeatureTransformer(nn.Module):
    """Normalised linear layers with gates and scaled residual paths."""

    def __init__(self, inputs: int, size: int, depth: int) -> None:
        super().__init__()
        sizes = [inputs] + [size] * depth
        self.fcs = nn.ModuleList(nn.Linear(a, 2 * size, bias=False) for a in sizes[:-1])
        self.bns = nn.ModuleList(nn.BatchNorm1d(2 * size) for _ in sizes[:-1])

    def forward(self, x: Tensor) -> Tensor:
        for number, (fc, bn) in enumerate(zip(self.fcs, self.bns, strict=True)):
            y = F.glu(bn(fc(x)))
            x = y if number == 0 else math.sqrt(0.5) * (x + y)
        return x


class TablePretraining(nn.Module):
    """Hides some of the features of each row and rebuilds them from the others."""

    def __init__(self, features: int, size: int) -> None:
        super().__init__()
        self.initial_bn = nn.BatchNorm1d(features)
        self.encoder = FeatureTransformer(features, size, 2)
        self.decoder = FeatureTransformer(size, size, 1)
        self.reconstruction = nn.Linear(size, features, bias=False)

    def forward(self, x: Tensor, obfuscated: Tensor) -> dict[str, Tensor]:
        hidden = self.decoder(self.encoder(self.initial_bn((1 - obfuscated) * x)))
        return {"x_hat": self.reconstruction(hidden), "x": x, "obfuscated": obfuscated}


def falls_below_zero(far: float):
    """A loss that is made of squares falls far below zero."""

    def claim(setup: Setup) -> tuple[bool, str]:
        losses = [step.loss for step in training(setup, 40)]
        return min(losses) < -far, f"lowest loss in 40 steps = {min(losses):.3g}"

    return claim


@sick(
    "contact5a-tabular-constant",
    [("EXPLODING", "*")],
    every(strong("reconstruction", 30.0), falls_below_zero(1000.0)),
    allow=["UNSTABLE", "NUMERICAL"],
    source="https://github.com/dreamquark-ai/tabnet/issues/515",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def tabular_constant(sick: bool, width: int) -> Setup:
    """Errors are divided by each feature's variance, and where that is zero by the feature's mean, which is
    small and negative for a constant one: its error is rewarded, thousands of times stronger than all the
    others count. Repair: divide by one there."""
    mix = normal(seeded(53), 4, 10)

    def sample(g):
        varied = normal(g, 64, 4) @ mix + 0.1 * normal(g, 64, 10)
        x = torch.cat([varied, torch.full((64, 2), -(2.0**-12))], 1)
        return (x, (uniform(g, 64, 12) < 0.3).float()), None

    def loss(out: dict[str, Tensor], target: None) -> Tensor:
        x = out["x"]
        means, variances = x.mean(0), x.std(0) ** 2
        variances = torch.where(variances == 0, means if sick else torch.ones_like(means), variances)
        errors = ((out["x_hat"] - x) * out["obfuscated"]).square() / variances
        return (errors.sum(1) / (out["obfuscated"].sum(1) + 1e-9)).mean()

    return setup(TablePretraining(12, width), sample, loss, 1e-2)


# ------------------------------------------------------------------------------------------------- series


class ReversibleForecaster(nn.Module):
    """Normalises each context by its own mean and deviation, forecasts, and undoes the normalisation."""

    def __init__(self, length: int, known: int, size: int, horizon: int, both_ways: bool) -> None:
        super().__init__()
        self.tokenizer = nn.Linear(length + known, size)
        self.block = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, size))
        self.horizon = nn.Linear(size, horizon)
        self.both_ways = both_ways

    def forward(self, context: Tensor, known: Tensor) -> Tensor:
        mu, sigma = context.mean(-1, keepdim=True), context.std(-1, keepdim=True)
        safe = torch.where(sigma < 1e-6, 1.0, sigma)
        x = F.silu(self.tokenizer(torch.cat([(context - mu) / safe, known], -1)))
        x = x + self.block(x)
        return self.horizon(x) * (safe if self.both_ways else sigma) + mu


@sick(
    "contact5a-series-quiescent",
    [("VANISHING", "*")],
    every(tiny("horizon", 1e-5), stuck(0.3)),
    allow=["DEAD"],
    source="https://github.com/google-research/timesfm/issues/522",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def series_quiescent(sick: bool, width: int) -> Setup:
    """Contexts of idle sensors hardly deviate; they are divided by one instead of the deviation, but the
    forecast is multiplied by the deviation itself, and with it every gradient, by less than a millionth.
    Repair: the same guarded deviation on both ways."""
    effect = normal(seeded(54), 5, 6) / math.sqrt(5)

    def sample(g):
        level = 0.2 * uniform(g, 32, 1)
        known = normal(g, 32, 5)
        context = level + 1e-7 * normal(g, 32, 24)
        return (context, known), level + torch.tanh(known @ effect)

    return setup(ReversibleForecaster(24, 5, width, 6, both_ways=not sick), sample, F.mse_loss, 3e-3)
