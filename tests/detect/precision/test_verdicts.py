"""Verdicts on precision: what a format loses is told once, where it begins; healthy models are silent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow as gf
from gradflow.detect import crawling, overflowing, scaler_issues, stuck_scaler, underflowing
from gradflow.records import Issue, IssueSeverity, IssueType, PrecisionRecord, Role, ScalerRecord
from gradflow.report import Report

_RANDOM = torch.Generator().manual_seed(0)
X, T = torch.randn(64, 32, generator=_RANDOM), torch.randint(0, 10, (64,), generator=_RANDOM)


def net(depth: int = 4, width: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(32, width), nn.ReLU()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), nn.ReLU()]
    for layer in layers[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # type: ignore[arg-type]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def conv() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (2, 4, 4)), nn.Conv2d(2, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def transformer() -> nn.Sequential:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.Sequential(
        nn.Unflatten(1, (4, 8)), nn.Linear(8, 32),
        nn.TransformerEncoder(block, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def diagnosed(model: nn.Module, dtype: torch.dtype | None, factor: float = 1.0, **options: Any) -> Report:
    def forward(m: nn.Module, step: int) -> Tensor:
        if dtype is None:
            return m(X)
        with torch.autocast("cpu", dtype=dtype):
            return m(X).float()

    return gf.diagnose_custom(model, forward, lambda y: factor * F.cross_entropy(y, T), steps=3, **options)


def own(report: Report) -> list[Issue]:
    """Return the issues of the detectors of precision."""
    detectors = (underflowing(), overflowing(), crawling(), stuck_scaler())
    return [issue for detector in detectors for issue in detector(report.record)]


@pytest.mark.parametrize("make", [net, conv, transformer])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_healthy_models_are_silent(make: Callable[[], nn.Module], dtype: torch.dtype | None) -> None:
    scale = 65536.0 if dtype is torch.float16 else None
    report = diagnosed(make(), dtype, pipeline=gf.pipelines.precision(loss_scale=scale))
    assert report.record.precision is not None
    assert own(report) == []


@pytest.mark.parametrize("make", [net, transformer])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_healthy_models_all_of_a_short_format_are_silent(
    make: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    model = make().to(dtype)
    pipeline = gf.pipelines.precision(loss_scale=None if dtype is torch.bfloat16 else 4096.0)
    report = gf.diagnose_custom(
        model, lambda m, step: m(X.to(dtype)).float(), lambda y: F.cross_entropy(y, T), steps=3,
        pipeline=pipeline,
    )  # fmt: skip
    assert own(report) == []


def test_gradient_that_float16_loses_is_told_once_where_it_begins() -> None:
    report = diagnosed(net(8), torch.float16, 1e-5)
    (issue,) = own(report)
    assert (issue.issue_type, issue.severity) == (IssueType.VANISHING, IssueSeverity.CRITICAL)
    assert issue.evidence.plays(Role.UNDERFLOWING)
    known = report.record.precision
    assert known is not None
    losing = [p.layer for p in known.parameters if p.name.endswith("weight") and p.error[-1] >= 0.1]
    assert issue.layer == losing[-1]  # nearest the loss, measured by the gradients themselves
    assert issue.metrics["num_layers"] == len(losing)
    assert [cause.layer for cause in report.causes] == [issue.layer]
    dead = [other for other in report.issues if other.issue_type is IssueType.DEAD]
    assert dead
    assert all(other.evidence.explained_by == issue.layer for other in dead)
    scale = issue.metrics["best_scale"]
    assert f"2.0**{int(np.log2(scale))}" in issue.recommended_actions[0]


def test_the_remedy_is_one() -> None:
    (issue,) = own(diagnosed(net(8), torch.float16, 1e-5))
    scale = issue.metrics["best_scale"]
    healed = diagnosed(net(8), torch.float16, 1e-5, pipeline=gf.pipelines.precision(loss_scale=scale))
    assert own(healed) == []
    assert own(diagnosed(net(8), torch.bfloat16, 1e-5)) == []


def test_severity_is_how_much_is_lost() -> None:
    found = [own(diagnosed(net(4), torch.float16, factor)) for factor in (1.0, 1e-3, 1e-5, 1e-7)]
    worst = [max((issue.magnitude for issue in issues), default=0.0) for issues in found]
    assert worst == sorted(worst)
    assert (found[0], worst[-1]) == ([], 1.0)
    severities = [issues[0].severity for issues in found if issues]
    assert severities == sorted(severities)
    assert severities[-1] is IssueSeverity.CRITICAL


def test_a_loss_scale_that_is_too_small_is_to_be_raised() -> None:
    report = diagnosed(net(8), torch.float16, 1e-8, pipeline=gf.pipelines.precision(loss_scale=1024.0))
    (issue,) = own(report)
    assert "under a loss scale of 1024" in issue.description
    assert issue.recommended_actions[0].startswith("Raise the loss scale to 2.0**")


def test_a_model_that_has_learned_has_little_gradient_to_lose() -> None:
    torch.manual_seed(0)
    model, labels = net(3), (X[:, 0] > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(600):
        optimizer.zero_grad()
        F.cross_entropy(model(X), labels).backward()
        optimizer.step()

    def forward(m: nn.Module, step: int) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return m(X).float()

    report = gf.diagnose_custom(model, forward, lambda y: 1e-2 * F.cross_entropy(y, labels), steps=3)
    (issue,) = (found for found in own(report) if found.issue_type is IssueType.VANISHING)
    assert issue.magnitude > 0.5
    assert issue.severity is IssueSeverity.LOW


class Wide(nn.Module):
    """Two branches whose gradients are further apart than float16 is wide."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.Linear(32, 10), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.large(x), self.small(x)], 1)


def test_where_no_scale_holds_it_none_is_recommended() -> None:
    def loss(y: Tensor) -> Tensor:
        return 1e4 * F.cross_entropy(y[:, :10].float(), T) + 1e-12 * F.cross_entropy(y[:, 10:].float(), T)

    torch.manual_seed(0)
    model = Wide().half()
    report = gf.diagnose_custom(model, lambda m, step: m(X.half()), loss, steps=2)
    (issue,) = own(report)
    assert issue.layer == "small"
    assert issue.recommended_actions[0].startswith("Compute in bfloat16")
    assert "No loss scale holds it" in issue.recommended_actions[1]


@pytest.mark.parametrize("factor", [1.0, 1e-20])
def test_a_long_decay_in_single_precision_is_told_as_such_and_once(factor: float) -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(60) for m in (nn.Linear(32, 32), nn.Sigmoid())]
    report = diagnosed(nn.Sequential(*layers, nn.Linear(32, 10)), None, factor)
    assert underflowing()(report.record) == []
    (cause,) = report.causes
    assert cause.issue_type is IssueType.VANISHING
    assert "Sigmoid" not in cause.layer
    slow = [issue for issue in report.issues if issue.evidence.plays(Role.SUBNORMAL)]
    assert [issue.evidence.explained_by for issue in slow] == [cause.layer]


def test_a_loss_so_small_that_single_precision_ends_is_told() -> None:
    (lost, slow) = own(diagnosed(net(4), None, 1e-42))
    assert (lost.issue_type, slow.issue_type) == (IssueType.VANISHING, IssueType.NUMERICAL)
    assert lost.recommended_actions[0].startswith("The loss hands back gradients near the smallest number")


def test_a_bias_before_a_norm_layer_is_no_loss() -> None:
    report = diagnosed(conv(), torch.float16, pipeline=gf.pipelines.precision())
    known = report.record.precision
    assert known is not None
    assert known.parameter("1.bias").error[-1] > 0.2  # zero by mathematics: rounding is all there is
    assert [issue for issue in own(report) if issue.magnitude > 0.9] == []


@pytest.mark.parametrize(("outputs", "told"), [(100.0, 0), (20_000.0, 0), (40_000.0, 1), (65_504.0, 0)])
def test_outputs_near_the_largest_number(outputs: float, told: int) -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(32, 32).half(), nn.Linear(32, 10).half()

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            return self.head(x * 0) + 0.0 * self.relu(x)

        def relu(self, x: Tensor) -> Tensor:
            return x[:, :10]

    model = Large()
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.bias.fill_(outputs)
    record = gf.analyze_custom(
        model, lambda m, step: m(X.half()).float(), lambda y: F.cross_entropy(y, T), steps=1,
        measurements=[gf.functional.precision()],
    )  # fmt: skip
    found = list(overflowing()(record))
    assert len(found) == told
    assert all(issue.layer == "fc" and "largest number of float16" in issue.description for issue in found)


@pytest.mark.parametrize(("scale", "told"), [(2.0**16, 0), (2.0**20, 0), (2.0**30, 1)])
def test_a_loss_scale_that_is_far_too_large(scale: float, told: int) -> None:
    record = diagnosed(net(), torch.float16, pipeline=gf.pipelines.precision(loss_scale=scale)).record
    found = list(overflowing()(record))
    assert len(found) == told
    for issue in found:
        assert issue.issue_type is IssueType.NUMERICAL
        assert issue.metrics["best_scale"] * 256 <= scale
        assert "init_scale=" in issue.recommended_actions[0]
    assert list(underflowing()(record)) == []


def test_a_recurrent_layer_whose_gradient_dies_is_told_to_be_slow() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(8, 16), nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][-1])

    torch.manual_seed(0)
    x = torch.randn(256, 16, 8)
    report = gf.diagnose(Net(), lambda: x, lambda y: F.cross_entropy(y, T[:16]), steps=2)
    (slow,) = crawling()(report.record)
    assert (slow.layer, slow.issue_type) == ("rnn", IssueType.NUMERICAL)
    assert "set_flush_denormal(True)" in slow.recommended_actions[0]
    (cause,) = report.causes
    assert cause.issue_type is IssueType.VANISHING
    assert [i.evidence.explained_by for i in report.issues if i.issue_type is IssueType.NUMERICAL] == ["rnn"]


def test_slow_numbers_are_no_matter_of_other_devices_or_where_they_are_flushed() -> None:
    record = diagnosed(net(4), None, 1e-42).record
    assert record.precision is not None
    assert len(list(crawling()(record))) == 1
    elsewhere = attrs.evolve(record, provenance=attrs.evolve(record.provenance, device="cuda:0"))
    assert list(crawling()(elsewhere)) == []
    flushed = attrs.evolve(record, precision=attrs.evolve(record.precision, flushes=True))
    assert list(crawling()(flushed)) == []


# ----------------------------------------------------------------------------- scalers


def history(scale: list[float], skipped: list[bool]) -> ScalerRecord:
    return ScalerRecord(steps=range(len(scale)), scale=np.array(scale), skipped=np.array(skipped))  # type: ignore[arg-type]


HEALTHY = {
    "none yet": ([], []),
    "at its start": ([2.0 ** (16 - i) for i in range(9)], [True] * 9),
    "settled": ([2.0**9] * 200, [True] * 7 + [False] * 193),
    "once in its interval": ([2.0**14] * 1000, [i % 500 == 499 for i in range(1000)]),
    "found its scale late": ([2.0 ** max(16 - i, 2) for i in range(60)], [i < 14 for i in range(60)]),
}


@pytest.mark.parametrize("case", HEALTHY)
def test_healthy_scalers_are_silent(case: str) -> None:
    assert scaler_issues(history(*HEALTHY[case])) == ()


@pytest.mark.parametrize(
    ("scale", "skipped", "severity", "words"),
    [
        ([2.0 ** (16 - i) for i in range(40)], [True] * 40, "CRITICAL", "skipped the last 40 updates"),
        ([2.0**-2] * 60, [True] * 18 + [False] * 42, "HIGH", "down to a scale of 0.25"),
        ([2.0**10] * 90, [i % 3 == 0 for i in range(90)], "MEDIUM", "skips 3[0-9] % of the updates"),
    ],
)
def test_stuck_scalers(scale: list[float], skipped: list[bool], severity: str, words: str) -> None:
    (issue,) = scaler_issues(history(scale, skipped))
    assert issue.severity is IssueSeverity[severity]
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(issue.description)


def test_a_scaler_in_the_record_is_judged() -> None:
    record = gf.analyze(net(), [X], lambda y: F.cross_entropy(y, T), steps=1)
    assert list(stuck_scaler()(record)) == []
    stuck = PrecisionRecord(scaler=history([2.0 ** (16 - i) for i in range(40)], [True] * 40))
    (issue,) = stuck_scaler()(attrs.evolve(record, precision=stuck))
    assert issue.layer_type == "GradScaler"


def test_a_real_scaler_that_meets_nan_is_stuck() -> None:
    model, scaler = nn.Linear(2, 1), torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scales, skipped = [], []
    for _ in range(30):
        loss = model(torch.ones(1, 2)).sum() * float("nan")
        scaler.scale(loss).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
        skipped.append(scaler.get_scale() < before)
    (issue,) = scaler_issues(history(scales, skipped))
    assert issue.severity is IssueSeverity.CRITICAL
