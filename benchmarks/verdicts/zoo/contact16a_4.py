"""Healthy trainings after public reports whose answer was that this is how it should be."""

from __future__ import annotations

import copy
import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, flat, no_gradient, training
from .contact16a_1 import Decoder, unmoved
from .data import choice, discs, frozen, grammar, normal, seeded, setup, token_loss, uniform
from .registry import FLOAT32, Setup, healthy


def below_zero(steps: int = 100) -> Claim:
    """The loss is negative after some steps."""

    def claim(setup: Setup) -> tuple[bool, str]:
        *_, last = training(setup, steps)
        return last.loss < 0, f"loss after {steps} steps = {last.loss:.3g}"

    return claim


def nothing_at_first(below: float = 1e-6) -> Claim:
    """The loss of the first step is zero but for rounding."""

    def claim(setup: Setup) -> tuple[bool, str]:
        first = next(training(setup, 1))
        return abs(first.loss) < below, f"loss at first = {first.loss:.2g}, gradient {first.norm('*'):.2g}"

    return claim


def zeros_in(module: str, share: float, *, steps: int = 20) -> Claim:
    """More than a share of a module's outputs is exactly zero."""

    def claim(setup: Setup) -> tuple[bool, str]:
        *_, last = training(setup, steps, (module,))
        seen = float((last.outputs[module] == 0).float().mean())
        return seen > share, f"{seen:.0%} of {module} is zero"

    return claim


def zeros_in_gradient(parameter: str, share: float, *, steps: int = 20) -> Claim:
    """More than a share of a parameter's gradient is exactly zero."""

    def claim(setup: Setup) -> tuple[bool, str]:
        *_, last = training(setup, steps)
        seen = float((last.grads[parameter] == 0).float().mean())
        return seen > share, f"{seen:.0%} of the gradient of {parameter} is zero"

    return claim


@healthy(
    "contact16a-healthy-warmup",
    unmoved("*", after=1),
    source="https://github.com/karpathy/nanoGPT/pull/578",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def warm_up(width: int) -> Setup:
    """The linear warm-up starts at a rate of zero, so the first step leaves every weight as it was; from the
    second on it trains."""

    def optimizer(parameters: list[Tensor]) -> torch.optim.Optimizer:
        made = torch.optim.AdamW(parameters, lr=4e-3)
        warm = torch.optim.lr_scheduler.LambdaLR(made, lambda step: min(1.0, step / 15))
        made.register_step_post_hook(lambda *_: warm.step())
        return made

    return setup(Decoder(width, scaled=True), grammar(), token_loss, optimizer)


class Pupil(nn.Module):
    """A small net that is to have the features of a teacher, which runs without a graph."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(12, 2 * width), nn.Tanh(), nn.Linear(2 * width, 16))
        self.student = nn.Sequential(nn.Linear(12, width), nn.GELU(), nn.Linear(width, width))
        self.project = nn.Linear(width, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            wanted = 3 * self.teacher(x)
        return self.project(self.student(x)), wanted


@healthy(
    "contact16a-healthy-openteacher",
    no_gradient("teacher"),
    source="https://github.com/lightly-ai/lightly-train/issues/352",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def open_teacher(width: int) -> Setup:
    """All parameters of the teacher say that they require a gradient and none ever gets one: it runs without
    a graph and the optimizer has only the student, as it should be."""
    model = Pupil(width)

    def points(g: Generator) -> tuple[Tensor, None]:
        return normal(g, 32, 12), None

    return setup(
        model,
        points,
        lambda output, _: F.mse_loss(*output),
        3e-3,
        trains=lambda: [*model.student.parameters(), *model.project.parameters()],
    )


@healthy(
    "contact16a-healthy-minusdice",
    below_zero(),
    source="https://github.com/MIC-DKFZ/nnUNet/issues/1795",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def minus_dice(width: int) -> Setup:
    """The loss of the segmentation is negative after a while and heads for minus one: it is the cross entropy
    minus the Dice score."""

    def loss(output: Tensor, mask: Tensor) -> Tensor:
        seen = output.sigmoid()
        dice = (2 * (seen * mask).sum((1, 2, 3)) + 1) / (seen.sum((1, 2, 3)) + mask.sum((1, 2, 3)) + 1)
        return F.binary_cross_entropy_with_logits(output, mask) - dice.mean()

    net = nn.Sequential(
        nn.Conv2d(1, width // 2, 3, 1, 1),
        nn.InstanceNorm2d(width // 2, affine=True),
        nn.LeakyReLU(0.01),
        nn.Conv2d(width // 2, width // 2, 3, 1, 1),
        nn.InstanceNorm2d(width // 2, affine=True),
        nn.LeakyReLU(0.01),
        nn.Conv2d(width // 2, 1, 1),
    )
    return setup(net, discs(), loss, 3e-3)


@healthy(
    "contact16a-healthy-zeroloss",
    nothing_at_first(),
    source="https://github.com/bbruceyuan/Hands-On-Large-Language-Models-CN/issues/9",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def zero_loss(width: int) -> Setup:
    """The loss of the first update of a group-relative policy is zero: all ratios to the old policy are one,
    and the advantages are centred. Its gradient is not zero, and it learns."""
    policy = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 6))
    old = frozen(copy.deepcopy(policy))
    best = normal(seeded(81), 8, 6)

    def rollouts(g: Generator) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        prompts = normal(g, 16, 8)
        logs = old(prompts).log_softmax(-1)
        actions = torch.multinomial(logs.exp(), 8, replacement=True, generator=g)
        reward = (prompts @ best).gather(1, actions)
        advantage = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)
        return prompts, (actions, advantage, logs.gather(1, actions))

    def loss(output: Tensor, target: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        actions, advantage, before = target
        ratio = (output.log_softmax(-1).gather(1, actions) - before).exp()
        return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()

    return setup(policy, rollouts, loss, 1e-3)


class RareObjects(nn.Module):
    """A head that tells for each of many places whether there is an object, with a bias for rare ones."""

    def __init__(self, width: int, prior: float) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1))
        self.act = nn.ReLU()
        self.score = nn.Conv2d(width, 1, 1)
        nn.init.normal_(self.score.weight, std=0.01)
        nn.init.constant_(self.score.bias, -math.log((1 - prior) / prior))

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.act(self.body(x)))


@healthy(
    "contact16a-healthy-rarebias",
    flat("score", "sigmoid of", 0.9),
    source="https://github.com/yjh0410/CenterNet-Lite/pull/14",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def rare_bias(width: int) -> Setup:
    """All scores of the heat map start where the sigmoid is flat: the bias is set for objects at one place in
    two hundred, so that the many empty places do not drown the few objects at first."""

    def one(g: Generator) -> tuple[Tensor, Tensor]:
        at = choice(g, 10, 16, 2) + 1
        heat = torch.zeros(16, 1, 12, 12)
        heat[torch.arange(16), 0, at[:, 0], at[:, 1]] = 1.0
        spot = F.max_pool2d(heat, 3, 1, 1)
        return spot + 0.3 * normal(g, 16, 1, 12, 12), heat

    def focal(output: Tensor, heat: Tensor) -> Tensor:
        plain = F.binary_cross_entropy_with_logits(output, heat, reduction="none")
        missed = (output.sigmoid() - heat).abs()
        return (missed.square() * plain).sum() / heat.sum()

    return setup(RareObjects(width, 0.005), one, focal, 3e-3)


class SparseMax(nn.Module):
    """The projection onto the simplex, most of whose outputs are zero."""

    def forward(self, x: Tensor) -> Tensor:
        ordered, _ = x.sort(-1, descending=True)
        total = ordered.cumsum(-1) - 1
        rank = torch.arange(1, x.shape[-1] + 1)
        number = (rank * ordered > total).sum(-1, keepdim=True)
        return (x - total.gather(-1, number - 1) / number).clamp_min(0)


class TableNet(nn.Module):
    """Two steps that each choose features with a sparse mask and add to the answer."""

    def __init__(self, width: int, features: int = 24) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(features)
        self.choose = nn.ModuleList(nn.Linear(features, features) for _ in range(2))
        self.mask = SparseMax()
        self.learn = nn.ModuleList(nn.Linear(features, width) for _ in range(2))
        self.out = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        prior, total = 1.0, 0.0
        for choose, learn in zip(self.choose, self.learn, strict=False):
            mask = self.mask(choose(x) * prior)
            prior = prior * (1.5 - mask)
            total = total + F.relu(learn(mask * x))
        return self.out(total)


@healthy(
    "contact16a-healthy-sparsemask",
    zeros_in("mask", 0.6),
    source="https://github.com/dreamquark-ai/tabnet/issues/532",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def sparse_mask(width: int) -> Setup:
    """Most of the importances are exactly zero: each step of the table's network chooses a few features for
    every row with a sparse softmax, and the others get nothing from that row."""

    def table(g: Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 64, 24)
        return x, (2 * x[:, :1] - 1.5 * x[:, 1:2] > 0).float()

    return setup(TableNet(width), table, F.binary_cross_entropy_with_logits, 1e-2)


class QNet(nn.Module):
    """Action values, and those of the next states from a copy that follows now and then."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.online = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 4))
        self.target = copy.deepcopy(self.online)

    def forward(self, state: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            later = self.target(after).amax(1)
        return self.online(state), later


@healthy(
    "contact16a-healthy-heldtarget",
    no_gradient("target"),
    source="https://github.com/DeepRLChinese/DeepRL-Chinese/issues/3",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def held_target(width: int) -> Setup:
    """The loss of the action values swings, and the target net gets no gradient at all: the targets are held,
    and move only when the net is copied, every 20 steps."""
    model = QNet(width)
    pays = normal(seeded(82), 6, 4)

    def steps(g: Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        state, action = normal(g, 64, 6), choice(g, 4, 64, 1)
        return (state, normal(g, 64, 6)), (action, (state @ pays).gather(1, action)[:, 0])

    def loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
        values, later = output
        action, reward = target
        return F.smooth_l1_loss(values.gather(1, action)[:, 0], reward + 0.5 * later)

    def optimizer(parameters: list[Tensor]) -> torch.optim.Optimizer:
        made = torch.optim.Adam(parameters, lr=5e-3)
        done = [0]

        def follow(*_: object) -> None:
            done[0] += 1
            if done[0] % 20 == 0:
                model.target.load_state_dict(model.online.state_dict())

        made.register_step_post_hook(follow)
        return made

    return setup(model, steps, loss, optimizer, trains=model.online.parameters)


@healthy(
    "contact16a-healthy-prunedcritic",
    zeros_in_gradient("2.weight", 0.85),
    source="https://github.com/lilucse/SparseNetwork4DRL/issues/2",
    widths=(64,),
    dtypes=(FLOAT32,),
)
def pruned_critic(width: int) -> Setup:
    """Nine of ten weights of the value net are zero and get a gradient of exactly zero: it was made sparse
    once, at the start, and gradients are masked so that it stays so. The rest is sized for it and learns."""
    net = nn.Sequential(
        nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
    )
    for layer, density in ((net[0], 0.5), (net[2], 0.1)):
        mask = (uniform(seeded(layer.in_features), *layer.weight.shape) < density).float()
        nn.init.normal_(layer.weight, std=math.sqrt(2 / (density * layer.in_features)))
        with torch.no_grad():
            layer.weight.mul_(mask)
        layer.weight.register_hook(lambda grad, mask=mask: grad * mask)

    def returns(g: Generator) -> tuple[Tensor, Tensor]:
        state = normal(g, 64, 8)
        return state, state[:, :1].abs() + torch.sin(state[:, 1:2]) + 1

    return setup(net, returns, F.mse_loss, 3e-3)
