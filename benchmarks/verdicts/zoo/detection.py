"""Losses as in detection: boxes, keypoints, rare objects."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .claims import flat, no_gradient, not_finite
from .data import Setup, discs, normal, setup, stack, uniform
from .registry import healthy, sick

SIZE = 10


def boxes_from(x: Tensor) -> Tensor:
    """Return boxes (x0, y0, x1, y1) in the unit square that the features tell."""
    corner = 0.1 + 0.4 * torch.sigmoid(x[:, :2])
    return torch.cat([corner, corner + 0.2 + 0.2 * torch.sigmoid(x[:, 2:4])], -1)


def overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the areas of the intersection, of the union and of the hull of boxes."""
    size = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).clamp(min=0)
    both = size.prod(-1)
    union = (a[:, 2:] - a[:, :2]).prod(-1) + (b[:, 2:] - b[:, :2]).prod(-1) - both
    return both, union, hull.prod(-1)


class Boxes(nn.Module):
    """A network that returns boxes by corner and size; `far` moves all of them away at the start."""

    def __init__(self, width: int, far: float = 0.0) -> None:
        super().__init__()
        self.body = stack(fc=nn.Linear(SIZE, width), act=nn.ReLU())
        self.corner, self.extent, self.far = nn.Linear(width, 2), nn.Linear(width, 2), far

    def forward(self, x: Tensor) -> Tensor:
        """Return boxes (x0, y0, x1, y1)."""
        h = self.body(x)
        corner = self.corner(h) + self.far
        return torch.cat([corner, corner + 0.05 + F.softplus(self.extent(h))], -1)


def box_task(g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return features and the boxes that they tell."""
    x = normal(g, 32, SIZE)
    return x, boxes_from(x)


@sick(
    "detection-boxes-that-never-meet",
    [("DEAD", "*")],
    no_gradient("*"),
    allow=["SATURATION"],
    source="https://arxiv.org/abs/1902.09630",
)
def boxes_never_meet(sick: bool, width: int) -> Setup:
    """All predicted boxes start outside the picture, where the overlap with any target is zero and flat; a
    loss that also looks at the hull pulls them in."""

    def loss(boxes: Tensor, target: Tensor) -> Tensor:
        both, union, hull = overlap(boxes, target)
        share = both / union
        return (1 - share).mean() if sick else (1 - share + (hull - union) / hull).mean()

    return setup(Boxes(width, far=4.0), box_task, loss, 1e-2)


@sick("detection-boxes-of-no-area", [("NUMERICAL", "*")], not_finite(loss=True), steps=200, falls_to=0.92)
def boxes_of_no_area(sick: bool, width: int) -> Setup:
    """The sizes are rectified and some are zero, and so are those of padded targets: 0/0 in the overlap; a
    small number in the union holds it."""

    class Corner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.out = stack(fc=nn.Linear(SIZE, width), act=nn.ReLU()), nn.Linear(width, 4)

        def forward(self, x: Tensor) -> Tensor:
            corner, size = self.out(self.body(x)).chunk(2, -1)
            return torch.cat([corner, corner + F.relu(size)], -1)

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        x, boxes = box_task(g)
        boxes[::4] = 0.0
        return x, boxes

    def loss(boxes: Tensor, target: Tensor) -> Tensor:
        both, union, _ = overlap(boxes, target)
        share = both / (union if sick else union + 1e-6)
        return (1 - share).mean() + (boxes - target).abs().mean()

    return setup(Corner(), sample, loss, 1e-2)


@sick("detection-logarithm-of-a-width", [("NUMERICAL", "*")], not_finite(loss=True))
def logarithm_of_width(sick: bool, width: int) -> Setup:
    """Sizes are told as logarithms against an anchor, and one object in fifty has no width in the labels: log
    0 in the targets. Drop such labels, or hold the width above a pixel."""

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 32, SIZE)
        size = 0.3 * torch.sigmoid(x[:, :2]) + 0.05
        size = torch.where(uniform(g, 32, 1) < 0.02, torch.zeros_like(size), size)
        return x, torch.log((size if sick else size.clamp(min=0.02)) / 0.2)

    net = stack(body=stack(fc=nn.Linear(SIZE, width), act=nn.ReLU()), size=nn.Linear(width, 2))
    return setup(net, sample, F.smooth_l1_loss, 1e-2)


class Keypoint(nn.Module):
    """A heat map over the picture, and the place of its peak."""

    def __init__(self, width: int, hard: bool) -> None:
        super().__init__()
        self.heatmap = stack(
            c0=nn.Conv2d(1, width, 3, padding=1), act=nn.ReLU(), c1=nn.Conv2d(width, 1, 3, padding=1)
        )
        self.fix = nn.Linear(2, 2)
        self.hard = hard

    def forward(self, x: Tensor) -> Tensor:
        """Return the place (row, column) in parts of the picture."""
        heat, side = self.heatmap(x).flatten(1), x.shape[-1]
        places = torch.stack([torch.arange(side * side) // side, torch.arange(side * side) % side], -1)
        places = (places / side).to(x.dtype)
        peak = places[heat.argmax(-1)] if self.hard else (4 * heat).softmax(-1) @ places
        return self.fix(peak)


@sick(
    "detection-peak-by-argmax",
    [("DEAD", "heatmap")],
    no_gradient("heatmap"),
    widths=(8, 16, 24),
    source="https://arxiv.org/abs/1711.08229",
)
def peak_by_argmax(sick: bool, width: int) -> Setup:
    """The place of a keypoint is where the heat map is largest, and a place has no gradient: only the layer
    behind learns. The mean place under the map's softmax has one."""
    inner = discs(16)

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        x, mask = inner(g)
        weight = mask / mask.sum((2, 3), keepdim=True)
        side = torch.arange(mask.shape[-1]) / mask.shape[-1]
        return x, torch.stack([(weight.sum(3) * side).sum((1, 2)), (weight.sum(2) * side).sum((1, 2))], -1)

    return setup(Keypoint(width, hard=sick), sample, F.mse_loss, 1e-2)


@sick("detection-score-only-compared", [("DEAD", "score")], no_gradient("score"))
def score_only_compared(sick: bool, width: int) -> Setup:
    """The objectness is used in a comparison that keeps or drops a box, and in no loss of its own: a
    comparison has no gradient."""

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.boxes, self.score = Boxes(width), nn.Linear(SIZE, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.boxes(x), self.score(x).squeeze(-1)

    def loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
        (boxes, score), (wanted, there) = output, target
        keep = (score.sigmoid() > 0.3).float() * there
        near = ((boxes - wanted).abs().mean(-1) * keep).sum() / keep.sum().clamp(min=1)
        return near if sick else near + F.binary_cross_entropy_with_logits(score, there)

    def sample(g: torch.Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x, boxes = box_task(g)
        return x, (boxes, (x[:, 5] > 0).float())

    return setup(Detector(), sample, loss, 1e-2)


@healthy(
    "detection-ok-rare-class-prior",
    flat("score", "sigmoid of", 0.05),
    source="https://arxiv.org/abs/1708.02002",
    falls_to=0.85,
)
def ok_rare_class(width: int) -> Setup:
    """A focal loss and a bias of -5 on the score: nearly all sigmoids are near zero from the start, as they
    should be where one place in a hundred holds an object."""
    net = stack(body=stack(fc=nn.Linear(SIZE, width), act=nn.ReLU()), score=nn.Linear(width, 1))
    nn.init.constant_(net.score.bias, -5.0), nn.init.normal_(net.score.weight, std=0.1)

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 512, SIZE)
        return x, (x[:, :1] + x[:, 1:2] > 3.0).float()

    def loss(score: Tensor, there: Tensor) -> Tensor:
        cross = F.binary_cross_entropy_with_logits(score, there, reduction="none")
        missed = torch.where(there > 0, 1 - score.sigmoid(), score.sigmoid())
        return (missed.square() * cross).sum() / there.sum().clamp(min=1)

    return setup(net, sample, loss, 1e-2)


@healthy("detection-ok-batches-without-objects")
def ok_no_objects(width: int) -> Setup:
    """In some batches no box is to be found, so the box head gets a loss of zero, rightly guarded."""

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.boxes, self.score = Boxes(width), nn.Linear(SIZE, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.boxes(x), self.score(x).squeeze(-1)

    def loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
        (boxes, score), (wanted, there) = output, target
        near = ((boxes - wanted).abs().mean(-1) * there).sum() / there.sum().clamp(min=1)
        return near + F.binary_cross_entropy_with_logits(score, there)

    def sample(g: torch.Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x, boxes = box_task(g)
        if float(uniform(g, 1)) < 0.3:
            x[:, 5] = -x[:, 5].abs()
        return x, (boxes, (x[:, 5] > 0).float())

    return setup(Detector(), sample, loss, 1e-2)


@healthy("detection-ok-overlap-with-hull")
def ok_overlap_with_hull(width: int) -> Setup:
    """The hull's term teaches boxes that do not meet their targets yet, while the overlap's own term is flat
    for them."""

    def loss(boxes: Tensor, target: Tensor) -> Tensor:
        both, union, hull = overlap(boxes, target)
        return (1 - both / union + (hull - union) / hull).mean()

    return setup(Boxes(width, far=1.0), box_task, loss, 1e-2)
