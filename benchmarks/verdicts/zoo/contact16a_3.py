"""Cases after public reports: distillation, tabular data and sparse nets."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import fading, not_finite
from .data import choice, frozen, normal, seeded, setup, sgd, stack, uniform
from .registry import FLOAT32, Setup, sick

CENTRES = normal(seeded(61), 8, 24)


def points(g: Generator) -> tuple[Tensor, Tensor]:
    """Points round eight centres; the target is which."""
    kind = choice(g, 8, 32)
    return CENTRES[kind] + 0.5 * normal(g, 32, 24), kind


class Student(nn.Module):
    """A student beside its frozen teacher."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.teacher = frozen(nn.Linear(24, 8))
        with torch.no_grad():
            self.teacher.weight.copy_(CENTRES / 8)
        self.net = nn.Sequential(nn.Linear(24, width), nn.ReLU(), nn.Linear(width, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x), self.teacher(x)


@sick(
    "contact16a-distil-logofsoftmax",
    [("NUMERICAL", "*")],
    not_finite(loss=True),
    source="https://github.com/yzd-v/cls_KD/issues/13",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def log_of_softmax(sick: bool, width: int) -> Setup:
    """The loss of the distillation is always NaN: the right class is masked out of the student's logits, its
    softmax is zero there, and the logarithm taken afterwards is infinite, which times the teacher's zero is
    NaN. The two as one log-softmax repair it."""

    def loss(output: tuple[Tensor, Tensor], kind: Tensor) -> Tensor:
        student, teacher = output
        right = 1000 * F.one_hot(kind, 8)
        others = student - right
        logs = torch.log(others.softmax(-1)) if sick else others.log_softmax(-1)
        return F.cross_entropy(student, kind) - ((teacher - right).softmax(-1) * logs).sum(-1).mean()

    return setup(Student(width), points, loss, 3e-3)


RULE = normal(seeded(62), 7)


@sick(
    "contact16a-tabular-gaps",
    [("NUMERICAL", "*")],
    not_finite(3, loss=True),
    source="https://github.com/epfml/disco/issues/615",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def gaps(sick: bool, width: int) -> Setup:
    """The loss on the passenger table is NaN in every epoch: since the preprocessing of tables was dropped,
    the gaps in the column of ages go into the network as NaN. Gaps filled with the mean repair it."""

    def table(g: Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 32, 7)
        y = (x @ RULE > 0).float()[:, None]
        x[uniform(g, 32) < 0.2, 3] = torch.nan
        return x if sick else x.nan_to_num(0.0), y

    net = nn.Sequential(
        nn.Linear(7, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
    )
    return setup(net, table, F.binary_cross_entropy_with_logits, sgd(0.2))


class FewInputs(nn.Linear):
    """A layer whose units have a few inputs each, chosen once."""

    def __init__(self, inputs: int, outputs: int, few: int, own_size: bool) -> None:
        super().__init__(inputs, outputs)
        chosen = torch.rand(outputs, inputs).argsort(1)[:, :few]
        self.register_buffer("mask", torch.zeros(outputs, inputs).scatter_(1, chosen, 1.0))
        nn.init.normal_(self.weight, std=math.sqrt(2 / (few if own_size else inputs)))
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


@sick(
    "contact16a-sparse-denseinit",
    [("VANISHING", "*")],
    fading("layer0", "layer5", 0.02),
    source="https://github.com/calgaryml/condensed-sparsity/pull/39",
    widths=(64,),
    dtypes=(FLOAT32,),
)
def dense_init(sick: bool, width: int) -> Setup:
    """Units with six inputs out of 64 are drawn at the size for dense layers: in every layer the signal and
    the gradient shrink to a third, and early ones get next to nothing. The size for six inputs repairs it."""
    sizes = [24, width, width, width, width, width, width]
    layers: dict[str, nn.Module] = {}
    for i in range(6):
        layers[f"layer{i}"] = FewInputs(sizes[i], sizes[i + 1], 6 if i else 12, own_size=not sick)
        layers[f"act{i}"] = nn.ReLU()

    return setup(stack(**layers, out=nn.Linear(width, 8)), points, F.cross_entropy, sgd(0.02, 0.9))
