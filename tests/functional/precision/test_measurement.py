"""What `precision()` records of real layers, against gradients by plain PyTorch; and that it is pure."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradflow as gf
from gradflow.functional import precision
from gradflow.records import FlowRecord, PrecisionRecord
from tests.functional.precision.test_counts import SHORT, by_cast, shares

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(288, 16),
        nn.GELU(),
        nn.Linear(16, 4),
    )


def tiny_loss(y: Tensor) -> Tensor:
    return 1e-4 * y.logsumexp(1).square().mean()


def measured(
    model: nn.Module, loss_fn: Callable[[Tensor], Tensor] = tiny_loss, **options: Any
) -> PrecisionRecord:
    dtype = next(model.parameters()).dtype
    scale = options.pop("loss_scale", None)
    options.setdefault("steps", 1)
    batches = lambda: X.to(dtype)  # noqa: E731
    record = gf.analyze(model, batches, loss_fn, measurements=[precision(loss_scale=scale)], **options)
    assert record.precision is not None
    assert FlowRecord.from_json(record.to_json()) == record
    return record.precision


def by_autograd(
    model: nn.Module, loss_fn: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradients of layers and of parameters, by hooks on tensors."""
    model, found, kept = copy.deepcopy(model), {}, {}

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            output = output.clone()  # a rectifier in place would write to what the hook is on
            output.register_hook(lambda g: found.__setitem__(name, g))
            kept[name] = output.detach().clone()
            return output

        return hook

    for name, module in model.named_children():
        module.register_forward_hook(keep(name))
    loss_fn(model(X)).backward()
    parameters = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {f"out {name}": y for name, y in kept.items()}, parameters


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("scale", [1.0, 2.0**8, 2.0**30])
def test_shares_of_real_layers_are_those_of_casting_their_gradients(name: str, scale: float) -> None:
    model = cnn()
    known = measured(model)
    layers, parameters = by_autograd(model, tiny_loss)
    assert [layer.name for layer in known.layers] == [child for child, _ in model.named_children()]
    for layer in known.layers:
        assert layer.gradient is not None
        assert layer.activation is not None
        assert shares(layer.gradient, name, scale) == by_cast(layers[layer.name], name, scale)
        assert shares(layer.activation, name, scale) == by_cast(layers[f"out {layer.name}"], name, scale)
    assert [p.name for p in known.parameters] == list(parameters)
    for part in known.parameters:
        assert part.gradient is not None
        assert shares(part.gradient, name, scale) == by_cast(parameters[part.name], name, scale)


def test_the_best_scale_is_the_one_that_a_search_by_casting_finds() -> None:
    model = cnn()
    known, (layers, parameters) = measured(model), by_autograd(model, tiny_loss)
    taken = [g for name, g in layers.items() if "out" not in name] + list(parameters.values())
    every = torch.cat([g.flatten() for g in taken])
    for name in ("float16", "float8_e5m2", "float8_e4m3fn"):
        tried = {k: by_cast(every, name, 2.0**k) for k in range(-10, 50)}
        fits = {k: found for k, found in tried.items() if found[2] == 0}
        best = min(fits, key=lambda k: (fits[k][0], fits[k][1], abs(k)))
        assert known.best_scale(name) == 2.0**best
    assert known.best_scale("bfloat16") == 1.0


class Halved(nn.Module):
    """A linear layer in float16 whose gradient is one number everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False).half(), nn.Linear(4, 4, bias=False).half()
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(4))
            self.second.weight.copy_(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize(
    ("k", "scale", "lost"), [(-24, None, 0.0), (-26, None, 1.0), (-26, 2.0**10, 0.0), (-40, 2.0**10, 1.0)]
)
def test_what_is_lost_in_half_precision_is_told_by_a_larger_scale(
    k: int, scale: float | None, lost: float
) -> None:
    x = torch.ones(1, 4, dtype=torch.float16)
    known = gf.analyze(
        Halved(), [x], lambda y: 2.0**k * y.float().sum(), measurements=[precision(loss_scale=scale)]
    ).precision
    assert known is not None
    layer, part = known["first"], known.parameter("first.weight")
    assert layer.gradient is not None
    assert layer.gradient.largest == layer.gradient.smallest == 2.0**k
    assert layer.lost() == part.lost() == lost
    assert part.error.tolist() == [lost]
    assert part.norm.tolist() == [4 * 2.0**k]
    assert known.loss_scale == (scale or 1)
    assert known.reference_scales[0] > known.loss_scale
    assert layer.gradient.dtype == "float16"


def test_a_scale_that_overflows_is_seen_and_a_smaller_one_tells_the_gradient() -> None:
    x = torch.ones(1, 4, dtype=torch.float16)
    known = gf.analyze(
        Halved(), [x], lambda y: y.float().sum(), measurements=[precision(loss_scale=2.0**18)]
    ).precision
    assert known is not None
    layer = known["first"]
    assert layer.computed is not None
    assert layer.gradient is not None
    assert layer.computed.num_infinite.tolist() == [4]
    assert layer.gradient.largest == 1.0
    assert known.best_scale("float16") == 1.0


def test_under_autocast_the_error_is_that_against_single_precision() -> None:
    model = cnn()

    def forward(m: nn.Module, step: int) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return m(X).float()

    known = gf.analyze_custom(model, forward, tiny_loss, steps=1, measurements=[precision()]).precision
    assert known is not None
    halved = copy.deepcopy(model)
    tiny_loss(forward(halved, 0)).backward()
    _, exact = by_autograd(model, tiny_loss)
    part, other = known.parameter("0.weight"), dict(halved.named_parameters())["0.weight"].grad
    assert other is not None
    expected = float((other - exact["0.weight"]).norm() / exact["0.weight"].norm())
    assert part.error[0] == pytest.approx(expected, rel=0.1)
    assert part.error[0] > 0.05
    assert known["0"].gradient is not None
    assert (known["0"].gradient.dtype, known["3"].lost() > 0) == ("float16", True)


def test_nothing_is_asked_twice_where_nothing_can_be_lost() -> None:
    known = measured(cnn(), steps=3)
    assert known.steps == (0, 1, 2)
    assert all(math.isnan(scale) for scale in known.reference_scales)
    assert all(layer.gradient == layer.computed for layer in known.layers)
    assert all(math.isnan(error) for part in known.parameters for error in part.error)


def test_single_precision_that_ends_is_followed_further() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(60)])
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.125)
    x = torch.full((1, 1), 2.0**120)
    known = gf.analyze(model, [x], lambda y: y.sum(), measurements=[precision()]).precision
    assert known is not None
    first = known["0"].gradient
    assert first is not None
    assert first.largest == 2.0 ** (-3 * 59)  # less than float32 holds
    assert known["0"].lost() == 1.0
    assert known["59"].lost() == 0.0


def by_hand_subnormal(number: int, factor: float) -> int:
    """Return how many of the gradients of a chain of products are subnormal."""
    g, found = torch.ones(()), 0
    for _ in range(number):
        found += int(0 < g.item() < 1.1754943e-38)
        g = g * factor
    return found


class Chain(nn.Module):
    """One weight, and a long chain of products."""

    def __init__(self, number: int, factor: float) -> None:
        super().__init__()
        self.fc, self.number, self.factor = nn.Linear(1, 1), number, factor

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        for _ in range(self.number):
            y = y * self.factor
        return y


def test_subnormal_numbers_are_counted_where_operations_meet_them() -> None:
    model = Chain(300, 0.7)
    known = gf.analyze(model, [torch.ones(1, 1)], lambda y: y.sum(), measurements=[precision()]).precision
    assert known is not None
    assert not known.flushes
    assert known.device == "cpu"
    total = sum(part.num_subnormal for part in known.subnormals if part.layer == "")
    assert total == by_hand_subnormal(300, 0.7)
    few = gf.analyze(Chain(30, 0.7), [torch.ones(1, 1)], lambda y: y.sum(), measurements=[precision()])
    assert few.precision is not None
    assert few.precision.subnormals == ()


def test_numbers_that_the_processor_flushes_are_none() -> None:
    torch.set_flush_denormal(True)
    try:
        model = Chain(300, 0.7)
        known = gf.analyze(model, [torch.ones(1, 1)], lambda y: y.sum(), measurements=[precision()]).precision
    finally:
        torch.set_flush_denormal(False)
    assert known is not None
    assert known.subnormals == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_run_is_what_it_is_without_it(dtype: torch.dtype) -> None:
    runs = []
    for chosen in ([], [precision()]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 2)).to(dtype)
        x = torch.randn(4, 8).to(dtype)
        before = {name: p.clone() for name, p in model.state_dict().items()}
        state = torch.get_rng_state()
        record = gf.analyze(
            model, lambda x=x: x, lambda y: y.float().square().mean(), steps=5, seed=3, measurements=chosen,
            optimizer=torch.optim.AdamW(model.parameters(), 0.01),
        )  # fmt: skip
        runs.append(repr((record.losses.tolist(), [layer.grad_norm.tolist() for layer in record])))
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
    assert runs[0] == runs[1]


def test_checkpoints_are_measured_and_reentrant_ones_noted() -> None:
    class Net(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.a, self.b, self.reentrant = nn.Linear(8, 8), nn.Linear(8, 2), reentrant

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone().requires_grad_()
            return self.b(checkpoint(lambda h: F.relu(self.a(h)), x, use_reentrant=self.reentrant))

    for reentrant in (False, True):
        record = gf.analyze(
            Net(reentrant), [torch.randn(4, 8)], lambda y: y.square().mean(), measurements=[precision()]
        )
        assert record.precision is not None
        assert (
            any("precision of gradients could not" in note for note in record.provenance.notes) is reentrant
        )
        assert (record.precision["a"].gradient is None) is reentrant


def test_layers_and_parameters_are_found_by_name() -> None:
    known = measured(cnn())
    with pytest.raises(gf.errors.UnknownLayerError, match="no entry named 'conv'"):
        known["conv"]
    with pytest.raises(gf.errors.UnknownLayerError, match="no entry named 'weight'"):
        known.parameter("weight")
    with pytest.raises(ValueError, match="power of two"):
        precision(loss_scale=1000.0)


def test_it_is_chosen_where_it_matters_alone() -> None:
    def chosen(model: nn.Module, x: Tensor) -> tuple[bool, str]:
        record = gf.diagnose(model, lambda: x, lambda y: y.float().sum(), steps=3).record
        return record.precision is not None, " ".join(record.provenance.chosen)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    assert chosen(net, torch.randn(16, 8)) == (False, "")
    found, why = chosen(copy.deepcopy(net).bfloat16(), torch.randn(16, 8).bfloat16())
    assert (found, why) == (True, "precision, since parameters are bfloat16; at the first and the last step")
    found, why = chosen(Chain(300, 0.7), torch.ones(4, 1))
    assert found
    assert "since the reverse pass comes to subnormal numbers; at the last step" in why
    model = copy.deepcopy(net)
    record = gf.diagnose_custom(
        model, lambda m, step: under_autocast(m), lambda y: y.float().square().mean(), steps=3
    ).record
    assert record.precision is not None
    assert record.provenance.chosen == (
        "precision, since 0 computes in bfloat16; at the first and the last step",
    )


def under_autocast(model: nn.Module) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(torch.ones(4, 8))


def test_measurements_of_ones_choice_are_not_doubled() -> None:
    pipeline = gf.pipelines.automatic(gf.pipelines.precision(loss_scale=2.0**10))
    report = gf.diagnose(Halved(), [torch.ones(2, 4).half()], lambda y: y.float().sum(), pipeline=pipeline)
    assert report.record.precision is not None
    assert report.record.precision.loss_scale == 2.0**10


@pytest.mark.parametrize("options", [{"transform": "vjp"}, {"detail": "full"}], ids=str)
def test_every_way_to_run_measures_the_same(options: dict[str, Any]) -> None:
    known, plain = measured(cnn(), **options), measured(cnn())
    assert known.layers == plain.layers
    assert known.parameters == plain.parameters


def test_tables_with_sparse_gradients_are_measured() -> None:
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 4, sparse=sparse), nn.Linear(4, 2)).half()
        known = gf.analyze(
            model, [torch.tensor([[1, 2, 2]])], lambda y: 1e-7 * y.float().square().mean(),
            measurements=[precision()],
        ).precision  # fmt: skip
        assert known is not None
        found.append(known.parameter("0.weight"))
    dense, sparse_ = found
    assert dense.error.tolist() == sparse_.error.tolist()
    assert dense.error[0] > 0.1
    assert dense.gradient is not None
    assert sparse_.gradient is not None
    assert dense.gradient.num_present() == sparse_.gradient.num_present()


def test_outputs_that_are_no_plain_tensors_are_passed_over() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sort, self.out = Sort(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            values, _ = self.sort(x)
            return self.out(values)

    class Sort(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.sort(x)

    known = gf.analyze(Net(), [torch.randn(3, 4)], lambda y: y.mean(), measurements=[precision()]).precision
    assert known is not None
    assert known["sort"].activation is not None
    assert known["sort"].activation.num_elements.tolist() == [12]
    assert known["sort"].gradient is None
