"""Products that a walk does not call say what they would if it did."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradflow as gf
from gradflow.functional.reach import blame, products
from gradflow.functional.reach.products import Product
from gradflow.functional.reach.zeros import Zeros
from gradflow.functional.reverse.reverse import call_node
from gradflow.functional.run import reverse_pass
from tests.functional.reach.planted import planted


def product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a @ b if bias is None else torch.addmm(bias, a, b)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_hits_are_those_of_a_call_with_random_numbers(seed: int, biased: bool) -> None:
    """Held against the call itself, for zeros of one label and everywhere, in any layout."""
    generator = torch.Generator().manual_seed(seed)
    n, k, m = (int(torch.randint(1, 80, (), generator=generator)) for _ in range(3))

    def sparse(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=generator) * (torch.rand(*shape, generator=generator) > 0.7)
        x[:, torch.rand(shape[1], generator=generator) > 0.7] = 0
        return x.t().contiguous().t() if seed % 2 else x

    a, b = sparse(n, k).requires_grad_(), sparse(k, m).requires_grad_()
    bias = torch.zeros(m, requires_grad=True) if biased else None
    node = product(a, b, bias).grad_fn
    labels = torch.randint(0, 3, (n, m), generator=generator).short()
    labels[:, torch.rand(m, generator=generator) > 0.5] = 1
    found = Product.of(node, labels)
    assert found is not None
    for label in (None, 1, 2):
        marked = torch.rand(n, m, generator=generator) + 1
        marked = marked if label is None else marked * (labels == label)
        given = [g for g in call_node(node, {0: marked}) if g is not None]
        called = [g.sum(0) if biased and j == 0 else g for j, g in enumerate(given)]
        zeros = {j: Zeros.of(torch.zeros_like(g)) for j, g in enumerate(called)}
        told = found.told(zeros, {j: z.places for j, z in zeros.items()}, label)
        assert told is not None
        for j, z in zeros.items():
            assert torch.equal(told[j], z.reached(called[j])), (j, label)


def test_scaled_products_and_others_are_called() -> None:
    a, b = torch.ones(2, 3, requires_grad=True), torch.ones(3, 4, requires_grad=True)
    assert Product.of(torch.addmm(torch.ones(4), a, b, alpha=2).grad_fn, None) is None
    assert Product.of((a @ b).relu().grad_fn, None) is None
    assert Product.of((a.double() @ b.double()).grad_fn, None) is not None


class Shared(nn.Module):
    """A layer of two calls, a weight in two products, and a mean whose parts cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(self.a(x).relu()).relu() @ self.weight
        return self.norm(self.b(y).mean(1, keepdim=True) + y @ self.weight + x)


def convolutional() -> nn.Module:
    conv = [nn.Conv2d(1, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3, groups=2), nn.ReLU()]
    return nn.Sequential(nn.Unflatten(1, (1, 6, 1)), nn.Upsample(6), *conv, nn.Flatten(), nn.LazyLinear(6))


def three_axes() -> nn.Module:
    off = nn.Linear(3, 9)
    nn.init.constant_(off.bias[:2].detach(), -10.0)
    return nn.Sequential(nn.Unflatten(1, (2, 3)), off, nn.ReLU(), nn.Linear(9, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "shared": Shared,
    "wide": lambda: nn.Sequential(
        nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 6)
    ),
    "three axes": three_axes,
    "convolutional": convolutional,
    **{f"planted {seed}": lambda seed=seed: planted(seed).model for seed in range(0, 60, 3)},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_account_is_that_of_a_walk_that_calls_all(
    name: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def account(*, steps: int) -> str:
        torch.manual_seed(0)
        model, x = MODELS[name](), torch.randn(5, 6)
        batch, loss = x, lambda y: y.square().mean()
        if name.startswith("planted"):
            case = planted(int(name.split()[1]))
            model, batch, loss = case.model, case.batch, case.loss
        else:
            model(x)
        optimizer = torch.optim.SGD(model.parameters(), 0.01) if training else None
        record = gf.analyze(model, lambda: batch, loss, steps=steps, optimizer=optimizer)
        assert record.reach is not None
        return record.to_json()

    known = []
    handed_back = products.handed_back
    with monkeypatch.context() as patch:
        patch.setattr(blame, "handed_back", lambda *args: known.append(handed_back(*args)) or known[-1])
        found = [account(steps=steps) for steps in (1, 3)]
    if name in ("wide", "three axes"):
        assert any(given is not None for given in known)
    monkeypatch.setattr(reverse_pass, "asked_edges", lambda nodes: {})
    monkeypatch.setattr(blame, "Product", type("Never", (), {"of": staticmethod(lambda *_: None)}))
    assert found == [account(steps=steps) for steps in (1, 3)]
