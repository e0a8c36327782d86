"""Steps as large as the weights that leave a model with one answer for all, and such as it bears."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow as gf
from gradflow.records import Issue, IssueType


class Angles(nn.Module):
    """Cosines between what a transformer makes of a picture's patches and the vectors of the classes."""

    def __init__(self, width: int, size: float = 0.01) -> None:
        super().__init__()
        self.embed = nn.Linear(12, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.feature = nn.Linear(width, width)
        self.classes = nn.Parameter(size * torch.randn(8, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h)
        return F.normalize(self.feature(h.mean(1)), dim=1) @ F.normalize(self.classes, dim=1).T


def margin(cosine: Tensor, kind: Tensor) -> Tensor:
    """Cross entropy of cosines times 64, with half a radian added to the angle of the right class."""
    angle = cosine.clamp(-1 + 1e-6, 1 - 1e-6).acos()
    hit = F.one_hot(kind, cosine.shape[1]).bool()
    return F.cross_entropy(64 * torch.where(hit, (angle + 0.5).cos(), cosine), kind)


def told(rate: float, width: int = 32, *, adam: bool = False, size: float = 0.01) -> list[Issue]:
    torch.manual_seed(0)
    model, g = Angles(width, size), torch.Generator().manual_seed(1)
    looks, batches = torch.randn(8, 16, 12, generator=g), []
    for _ in range(20):
        kind = torch.randint(8, (32,), generator=g)
        batches.append((looks[kind] + 0.7 * torch.randn(32, 16, 12, generator=g), kind))
    params = model.parameters()
    optimizer = torch.optim.Adam(params, rate) if adam else torch.optim.SGD(params, rate, 0.9)
    report = gf.diagnose(model, batches, margin, optimizer=optimizer)
    return [issue for issue in report.issues if issue.severity.is_serious]


@pytest.mark.parametrize(("rate", "width"), [(0.1, 32), (0.1, 48), (0.3, 64)])
def test_a_step_as_large_as_the_weights_that_flattens_a_model_is_told(rate: float, width: int) -> None:
    (issue, *_) = [i for i in told(rate, width) if i.issue_type is IssueType.UNSTABLE]
    assert issue.metrics["update_ratio"] > 0.5
    assert issue.recommended_actions[0].startswith(f"Lower the learning rate of SGD: {rate:.3g}")


@pytest.mark.parametrize(
    ("rate", "adam", "size"),
    [(1e-3, False, 0.01), (3e-3, False, 0.01), (1e-4, False, 0.01), (1e-3, True, 0.01), (3e-3, False, 1.0)],
)
def test_smaller_steps_are_not(rate: float, adam: bool, size: float) -> None:
    assert not told(rate, adam=adam, size=size)
