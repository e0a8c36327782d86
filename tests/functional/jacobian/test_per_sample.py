"""Gradients of single samples and their noise: against a loop, closed forms and known covariances."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradflow as gf
from gradflow.errors import (
    LossError,
    ModelCallError,
    ModelInputError,
    NoTrainableParametersError,
    UnknownLayerError,
)
from gradflow.functional import GradientNoise, LayerNoise
from tests.functional.jacobian.models import fingerprint


def slow(model: nn.Module, batch: Any, loss_fn: Any) -> dict[str, Tensor]:
    """Return the same by one ordinary backward pass per sample."""
    inputs, target = batch
    found: dict[str, list[Tensor]] = {}
    for index in range(len(target)):
        loss = loss_fn(model(inputs[index : index + 1]), target[index : index + 1])
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, [model.get_parameter(n) for n in names], materialize_grads=True)
        for name, grad in zip(names, grads, strict=True):
            found.setdefault(name, []).append(grad)
    return {name: torch.stack(grads) for name, grads in found.items()}


class Block(nn.Module):
    """A transformer layer and a recurrent one."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.recurrent = nn.LSTM(4, 3, batch_first=True)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.recurrent(self.block(x))[0][:, -1])


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.ReLU(inplace=True), nn.BatchNorm2d(2).eval(),
        nn.InstanceNorm2d(2, track_running_stats=True), nn.Flatten(), nn.Linear(18, 3),
    )  # fmt: skip


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (7, 4)),
    "conv": (images, (6, 1, 5, 5)),
    "block": (Block, (4, 5, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_they_equal_one_backward_pass_per_sample(case: str) -> None:
    make, shape = CASES[case]
    model, loss = make(), nn.CrossEntropyLoss()
    batch = torch.randn(shape), torch.randint(0, 3, (shape[0],))
    if case == "conv":
        model(batch[0])  # running statistics of InstanceNorm that are not the first ones
    before = fingerprint(model)
    options: list[dict[str, Any]] = [
        {},
        {"chunk_size": 2},
        {"method": "loop"},
        {"method": "loop", "chunk_size": 3},
    ]
    found = [gf.per_sample_gradients(model, batch, loss, **option) for option in options]
    assert fingerprint(model) == before
    expected = slow(model, batch, loss)
    for gradients in found:
        assert list(gradients) == list(expected)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
            assert not gradient.requires_grad
    model.zero_grad()
    loss(model(batch[0]), batch[1]).backward()
    for name, gradient in found[0].items():  # the mean of them is the gradient of the mean loss
        if case != "conv":
            torch.testing.assert_close(gradient.mean(0), model.get_parameter(name).grad, rtol=1e-4, atol=1e-5)


def test_closed_form_of_linear_regression() -> None:
    model, x, y = nn.Linear(3, 1), torch.randn(5, 3), torch.randn(5, 1)
    found = gf.per_sample_gradients(model, (x, y), nn.MSELoss())
    residual = 2 * (model(x) - y).detach()
    torch.testing.assert_close(found["weight"], (residual * x).unsqueeze(1))
    torch.testing.assert_close(found["bias"], residual)


def test_batches_of_other_shapes() -> None:
    class Keyed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 1)

        def forward(self, x: Tensor, weight: Tensor, scale: float = 1.0, table: Tensor | None = None) -> Any:
            loss = (self.linear(x) * weight).sum() * scale
            return {"loss": loss + (0 if table is None else table.sum())}

    model, x, weight = Keyed(), torch.randn(4, 3), torch.rand(4, 1)
    batch = {"x": x, "weight": weight, "scale": 2.0, "table": torch.ones(2, 2)}
    expected = (2 * weight * x).unsqueeze(1)
    torch.testing.assert_close(gf.per_sample_gradients(model, batch)["linear.weight"], expected)
    torch.testing.assert_close(
        gf.per_sample_gradients(model, (x, weight, 2.0), lambda out: out["loss"])["linear.weight"], expected
    )


def test_parameters_that_no_path_reaches_get_zeros() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    for method in ("vmap", "loop"):
        found = gf.per_sample_gradients(model, torch.ones(3, 2), lambda y: y.sum(), method=method)
        assert found["unused.weight"].shape == (3, 1, 2)
        assert not found["unused.weight"].any()


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_every_sample_draws_its_own_dropout_mask(method: Any) -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 1, bias=False))
    x = torch.ones(6, 64)
    for chunk_size in (1, 2, 6):
        found = gf.per_sample_gradients(
            model, x, lambda y: y.sum(), method=method, chunk_size=chunk_size, seed=0
        )
        assert len({tuple(row.reshape(-1).tolist()) for row in found["1.weight"]}) == 6
        again = gf.per_sample_gradients(
            model, x, lambda y: y.sum(), method=method, chunk_size=chunk_size, seed=0
        )
        assert torch.equal(found["1.weight"], again["1.weight"])


# ------------------------------------------------------------------------------------ the noise


def identity_gradients(width: int) -> nn.Module:
    """Return a model whose loss `y.sum()` has the sample itself as the gradient."""
    return nn.Linear(width, 1, bias=False)


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])
def test_trace_and_norm_are_those_of_the_sample_covariance(chunk_size: int | None) -> None:
    x = torch.randn(11, 5) @ torch.randn(5, 5) + 3
    noise = gf.gradient_noise(identity_gradients(5), x, lambda y: y.sum(), chunk_size=chunk_size)
    trace = float(np.trace(np.cov(x.numpy().astype(np.float64), rowvar=False)))
    squared = float((x.double().mean(0) ** 2).sum()) - trace / 11
    assert noise.total.trace == pytest.approx(trace, rel=1e-6)
    assert noise.total.squared_norm == pytest.approx(squared, rel=1e-6)
    assert noise.noise_scale == pytest.approx(trace / squared, rel=1e-6)
    assert noise.signal_to_noise == pytest.approx((squared / trace) ** 0.5, rel=1e-6)
    assert noise.num_samples == 11


def test_both_estimates_are_unbiased_for_a_known_covariance() -> None:
    model = identity_gradients(3)
    mean, root = torch.tensor([0.5, -0.5, 0.2]), torch.tensor([[1.0, 0, 0], [0.5, 1, 0], [0, 0.3, 0.7]])
    traces, norms = [], []
    for _ in range(300):
        x = mean + torch.randn(8, 3) @ root.T
        noise = gf.gradient_noise(model, x, lambda y: y.sum())
        traces.append(noise.total.trace)
        norms.append(noise.total.squared_norm)
    for found, truth in ((traces, float((root**2).sum())), (norms, float((mean**2).sum()))):
        assert np.mean(found) == pytest.approx(truth, abs=4 * np.std(found) / len(found) ** 0.5)
    biased = float((mean**2).sum() + (root**2).sum() / 8)
    assert abs(np.mean(norms) - biased) > 4 * np.std(norms) / len(norms) ** 0.5


def test_the_noise_scale_predicts_the_gain_of_a_larger_batch() -> None:
    # E|G_B|² = |G|² + tr Σ / B, the definition that McCandlish et al. start from (their equation A.1).
    model, loss = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)), nn.MSELoss()
    batch = torch.randn(64, 4), torch.randn(64, 1)
    noise = gf.gradient_noise(model, batch, loss)
    gradients = gf.per_sample_gradients(model, batch, loss)
    flat = torch.cat([g.flatten(1) for g in gradients.values()], dim=1).double()
    small, big = float((flat**2).sum(1).mean()), float((flat.mean(0) ** 2).sum())
    squared = (64 * big - small) / 63
    trace = (small - big) / (1 - 1 / 64)
    assert noise.total.squared_norm == pytest.approx(squared, rel=1e-6)
    assert noise.total.trace == pytest.approx(trace, rel=1e-6)


def test_layers_add_up_and_are_found_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    noise = gf.gradient_noise(model, (torch.randn(9, 4), torch.randint(0, 2, (9,))), nn.CrossEntropyLoss())
    assert [layer.name for layer in noise] == ["0", "2"]
    assert len(noise) == 2
    assert noise["2"] is noise[1]
    assert noise[0].num_parameters == 15
    assert noise.total.num_parameters == 23
    assert sum(layer.trace for layer in noise) == pytest.approx(noise.total.trace)
    assert sum(layer.squared_norm for layer in noise) == pytest.approx(noise.total.squared_norm)
    assert isinstance(noise, GradientNoise)
    with pytest.raises(UnknownLayerError, match="no entry named '1'"):
        noise["1"]


def test_loss_scale_does_not_matter() -> None:
    model, batch = nn.Linear(4, 2), (torch.randn(9, 4), torch.randn(9, 2))
    one = gf.gradient_noise(model, batch, nn.functional.mse_loss)
    many = gf.gradient_noise(model, batch, lambda y, t: 1e4 * nn.functional.mse_loss(y, t))
    assert many.noise_scale == pytest.approx(one.noise_scale, rel=1e-5)
    assert many.signal_to_noise == pytest.approx(one.signal_to_noise, rel=1e-5)


@pytest.mark.parametrize(
    ("squared_norm", "trace", "scale", "ratio"),
    [(4.0, 1.0, 0.25, 2.0), (-1.0, 1.0, np.inf, 0.0), (0.0, 1.0, np.inf, 0.0), (2.0, 0.0, 0.0, np.inf),
     (0.0, 0.0, np.nan, np.nan), (np.nan, 1.0, np.nan, np.nan), (np.nan, np.nan, np.nan, np.nan)],
)  # fmt: skip
def test_limits(squared_norm: float, trace: float, scale: float, ratio: float) -> None:
    noise = LayerNoise(name="a", num_parameters=1, squared_norm=squared_norm, trace=trace)
    assert noise.noise_scale == pytest.approx(scale, nan_ok=True)
    assert noise.signal_to_noise == pytest.approx(ratio, nan_ok=True)


def test_no_more_than_a_chunk_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradflow.functional.jacobian import per_sample

    monkeypatch.setattr(per_sample, "_CHUNK_ELEMENTS", 12)
    sizes: list[int] = []
    merge = per_sample._merge
    monkeypatch.setattr(per_sample, "_merge", lambda m, n, g, d: (sizes.append(len(g)), merge(m, n, g, d))[1])
    gf.gradient_noise(identity_gradients(5), torch.randn(7, 5), lambda y: y.sum())
    assert sizes == [2, 2, 2, 1]


# ------------------------------------------------------------------------------------ purity and errors


@pytest.mark.parametrize("function", [gf.per_sample_gradients, gf.gradient_noise])
@pytest.mark.parametrize("method", ["vmap", "loop"])
@pytest.mark.parametrize("fail_at", [0, 1, 2])
def test_everything_is_put_back(function: Any, method: Any, fail_at: int) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.drop, self.calls, self.kept = nn.Linear(3, 2), nn.Dropout(), 0, []

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.kept.append(x)
            runs.append(1)
            if len(runs) == fail_at:
                raise ZeroDivisionError("in the model")
            self.linear.extra = x
            return self.linear(self.drop(x))

    runs: list[int] = []
    model, x = Counting(), torch.randn(4, 3)
    before, kept = fingerprint(model), x.clone()
    with contextlib.suppress(ZeroDivisionError):
        function(model, x, lambda y: y.square().sum(), method=method)
        assert not fail_at
    assert fingerprint(model) == before
    assert torch.equal(x, kept)


def test_batch_norm_in_training_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    x = torch.randn(4, 3)
    with pytest.raises(ModelInputError, match=r"'1' .BatchNorm1d. in training .*model.eval.*GroupNorm"):
        gf.per_sample_gradients(model, x, lambda y: y.sum())
    assert gf.per_sample_gradients(model.eval(), x, lambda y: y.sum())["0.weight"].shape == (4, 3, 3)
    bare = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)).eval()
    with pytest.raises(ModelInputError, match="BatchNorm1d. without running statistics"):
        gf.gradient_noise(bare, x, lambda y: y.sum())


def test_a_model_that_vmap_rejects_names_the_loop() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return y if y.sum().item() > 0 else -y

    model, x = Branching(), torch.randn(4, 3)
    before = fingerprint(model)
    with pytest.raises(ModelCallError, match="vmap rejects Branching: .*Pass `method='loop'`"):
        gf.per_sample_gradients(model, x, lambda y: y.sum())
    assert fingerprint(model) == before
    found = gf.per_sample_gradients(model, x, lambda y: y.sum(), method="loop")
    expected = (x * model.linear(x).sign().detach()).unsqueeze(1)
    torch.testing.assert_close(found["linear.weight"], expected)


def test_other_errors() -> None:
    model, x = nn.Linear(3, 1), torch.randn(4, 3)
    total = lambda y: y.sum()  # noqa: E731
    with pytest.raises(ModelInputError, match="model is a Tensor, not a torch.nn.Module"):
        gf.per_sample_gradients(x, x, total)  # type: ignore[arg-type]
    with pytest.raises(ModelInputError, match=r"a batch must be a pair .inputs, target."):
        gf.per_sample_gradients(model, x, nn.MSELoss())
    with pytest.raises(ModelInputError, match="no tensor with samples along its first axis.*unsqueeze"):
        gf.per_sample_gradients(model, torch.tensor(1.0), total)
    with pytest.raises(ModelInputError, match="holds 1 sample, and a variance needs two"):
        gf.gradient_noise(model, x[:1], total)
    with pytest.raises(ValueError, match="method must be 'vmap' or 'loop', got 'fast'"):
        gf.per_sample_gradients(model, x, total, method="fast")  # type: ignore[arg-type]
    for chunk_size in (0, 1.5):
        with pytest.raises(ValueError, match="chunk_size must be a whole number of at least 1"):
            gf.per_sample_gradients(model, x, total, chunk_size=chunk_size)  # type: ignore[arg-type]
    with pytest.raises(LossError, match="the loss has shape .1, 2., not one number"):
        gf.per_sample_gradients(nn.Linear(3, 2), x, lambda y: y)
    with pytest.raises(LossError, match="the loss carries no gradient"):
        gf.per_sample_gradients(model, x, lambda y: y.detach().sum())
    with pytest.raises(NoTrainableParametersError, match="no parameter of Linear requires a gradient"):
        gf.gradient_noise(nn.Linear(3, 1).requires_grad_(False), x, total)
    with pytest.raises(RuntimeError, match="mat1 and mat2|shapes cannot be multiplied") as caught:
        gf.per_sample_gradients(model, torch.randn(4, 2), total)
    assert "on one sample of the batch, given as a batch of one ([1, 2])" in caught.value.__notes__[0]
