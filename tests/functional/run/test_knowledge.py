"""What outputs are worth against guesses: closed forms, what cannot be asked, and no trace left behind."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import KnowledgeRecord


def known(model: nn.Module, batch: object, loss: object, **options: object) -> KnowledgeRecord:
    found = gf.analyze(model, [batch] * 2, loss, **options).knowledge  # type: ignore[arg-type]
    assert found is not None
    return found


def test_two_samples_are_swapped_and_averaged() -> None:
    model, x, y = nn.Linear(3, 1), torch.randn(2, 3), torch.tensor([[0.0], [4.0]])
    found, out = known(model, (x, y), nn.MSELoss()), model(x).detach()
    assert found.loss == pytest.approx(F.mse_loss(out, y).item(), rel=1e-5)
    assert found.shuffled == pytest.approx(F.mse_loss(out.flip(0), y).item(), rel=1e-5)
    assert found.averaged == pytest.approx(F.mse_loss(out.mean(0).expand(2, 1), y).item(), rel=1e-5)
    assert found.silent == pytest.approx(8.0)
    assert (found.step, found.num_samples, found.shapes) == (1, 2, ((2, 1),))
    naive = float((out - out.mean(0)).norm() / out.norm())
    assert found.scales == pytest.approx((float(out.square().mean().sqrt()),), rel=1e-5)
    assert found.variations == pytest.approx((naive,), rel=1e-5)


def test_a_loss_below_zero_is_asked_of_louder_outputs_too() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    out = model(x).detach()
    square = known(model, x, lambda y: -y.square().mean())
    assert square.louder == pytest.approx(16 * square.loss, rel=1e-5)  # closed form
    mixed = known(model, x, lambda y: y.mean() - (y - 1).square().sum())
    assert mixed.louder == pytest.approx(float(4 * out.mean() - (4 * out - 1).square().sum()), rel=1e-5)
    assert math.isnan(known(model, x, lambda y: y.square().mean()).louder)


@pytest.mark.parametrize("number", [3, 8, 50])
def test_a_model_that_knows_pays_for_each_sample_that_is_shuffled(number: int) -> None:
    """Every target is another one, and each output is right: shuffled, all are wrong."""

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(1, 1, bias=False)
            nn.init.ones_(self.scale.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.scale(x)

    y = torch.arange(float(number))[:, None]
    found = known(Given(), (y, y), lambda out, target: (out != target).float().mean() + 0 * out.sum())
    assert (found.loss, found.shuffled) == (0.0, 1.0)
    assert found.share_left == 0.0


def test_a_constant_output_guesses_at_the_price_of_ignorance() -> None:
    model, x, y = nn.Linear(4, 5), torch.randn(40, 4), torch.arange(40) % 5
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    found = known(model, (x, y), nn.CrossEntropyLoss())
    assert found.shuffled == pytest.approx(math.log(5), rel=1e-6)
    assert found.silent == pytest.approx(math.log(5), rel=1e-6)
    assert found.ignorance == pytest.approx(math.log(5), rel=1e-6)
    assert found.share_left == pytest.approx(1.0, rel=1e-6)


def test_few_sequences_are_shuffled_by_their_positions() -> None:
    model, x = nn.Linear(3, 7), torch.randn(2, 11, 3)
    y = torch.randint(7, (2, 11))
    loss = lambda out, target: F.cross_entropy(out.flatten(0, 1), target.flatten())  # noqa: E731
    assert known(model, (x, y), loss).num_samples == 22
    assert known(model, (x.repeat(4, 1, 1), y.repeat(4, 1)), loss).num_samples == 8


def test_what_a_teacher_tells_is_a_target() -> None:
    """Zeros of the student are held against the teacher's answers, not against zeros."""

    class Pupil(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher, self.student = nn.Linear(4, 3).requires_grad_(False), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.student(x), self.teacher(x)

    model, x = Pupil(), torch.randn(32, 4)
    found = known(model, x, lambda out: F.mse_loss(*out))
    assert found.silent == pytest.approx(model.teacher(x).square().mean().item(), rel=1e-5)


def test_two_outputs_are_shuffled_each_in_its_own_way() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.one(x)
            return {"image": y, "text": y.clone(), "scale": y.mean()}

    def matched(out: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(out["image"], out["text"]) + 0 * out["scale"]

    found = known(Pair(), torch.randn(16, 6), matched)
    assert found.loss == 0.0 < found.shuffled


@pytest.mark.parametrize("transform", ["fused", "vjp"])
def test_what_cannot_be_asked_is_none(transform: str) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x).square().mean()

    def slope(out: Tensor) -> Tensor:
        return torch.autograd.grad(out.square().sum(), out, create_graph=True)[0].mean()

    x = torch.randn(8, 2)
    assert gf.analyze(Own(), [x], None, steps=1, transform=transform).knowledge is None  # type: ignore[arg-type]
    assert gf.analyze(nn.Linear(2, 2), [x[:1]], lambda out: out.sum(), steps=1).knowledge is None
    if transform == "fused":
        assert gf.analyze(nn.Linear(2, 2), [x], slope, steps=1).knowledge is None
    else:
        assert (
            gf.analyze(nn.Linear(2, 2), [x], lambda out: out.sum(), steps=1, transform="vjp").knowledge
            is None
        )


def test_nothing_is_left_behind() -> None:
    """The random state, what the loss module holds, and the outputs that a loss writes to."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0
            self.mean: Tensor
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, out: Tensor) -> Tensor:
            self.count += 1
            self.mean.add_(out.detach().mean())
            noise = torch.rand_like(out)
            out = out + noise
            out.add_(1.0)
            return out.square().mean()

    model, loss, x = nn.Linear(4, 4), Noisy(), torch.randn(8, 4)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = gf.analyze(model, [x] * 3, loss, steps=3)
    assert torch.equal(before, torch.get_rng_state())
    assert (loss.count, float(loss.mean)) == (0, 0.0)
    second = gf.analyze(model, [x] * 3, loss, steps=3)
    assert first.knowledge == second.knowledge
    assert first.knowledge is not None
    assert first.knowledge.loss == first.losses[-1]


def test_it_is_saved_and_read_back() -> None:
    record = gf.analyze(nn.Linear(2, 1), [torch.randn(8, 2)], lambda out: out.square().mean(), steps=1)
    assert gf.FlowRecord.from_json(record.to_json()).knowledge == record.knowledge is not None


class Twice(nn.Module):
    """A loss of two binary cross entropies, one of probabilities, whose targets differ."""

    def forward(self, out: Tensor, target: Tensor) -> Tensor:
        sure = F.binary_cross_entropy(out.sigmoid(), target.clamp(0, 1))
        return sure + F.binary_cross_entropy_with_logits(input=out, target=target)


@pytest.mark.parametrize(("loss", "odds"), [(Twice(), (-1.0, 3.0)), (nn.MSELoss(), ())])
def test_targets_that_are_to_be_probabilities_are_looked_at(loss: nn.Module, odds: tuple[float, ...]) -> None:
    target = torch.tensor([[-1.0], [0.5], [3.0]])
    assert known(nn.Linear(2, 1), (torch.randn(3, 2), target), loss).odds == odds


@pytest.mark.parametrize(("shape", "axis"), [((8, 3), 1), ((8, 5, 3), 2), ((8, 3, 4, 4), 1)])
def test_the_slope_at_one_column_beside_the_next(shape: tuple[int, ...], axis: int) -> None:
    weight = torch.tensor([1.0, 20.0, 4.0]).view([-1 if at == axis else 1 for at in range(len(shape))])
    model = nn.Linear(shape[-1], shape[-1])
    loss = lambda y: (weight * (100 - y)).sum()  # noqa: E731
    record = gf.analyze(model, [torch.randn(shape)], loss, optimizer=torch.optim.SGD(model.parameters(), 0.0))
    assert record.knowledge is not None
    assert record.knowledge.lone == pytest.approx(5.0)


class Whole(nn.Module):
    """A model that computes its own loss, and another term beside it if asked."""

    def __init__(self, body: nn.Module, loss: nn.Module, beside: float = 0.0) -> None:
        super().__init__()
        self.body, self.loss, self.beside = body, loss, beside

    def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the outputs and their loss."""
        out = self.body(x)
        loss = self.loss(out, target)
        return {"outputs": out, "loss": loss + self.beside * out.square().mean() if self.beside else loss}


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_a_loss_that_the_model_computes_is_asked_as_one_that_is_given(loss: nn.Module) -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    given = known(body, (x, y), loss)
    batch = {"x": x, "target": y}
    own, handed_on = (known(Whole(body, loss), batch, f) for f in (None, lambda out: out["loss"]))
    assert str(own) == str(handed_on) == str(given)
    assert own.shuffled > 0


def test_more_than_one_loss_function_gave_is_not_asked() -> None:
    torch.manual_seed(0)
    model = Whole(nn.Linear(4, 3), nn.CrossEntropyLoss(), beside=0.1)
    batch = {"x": torch.randn(16, 4), "target": torch.randint(3, (16,))}
    assert gf.analyze(model, [batch] * 2).knowledge is None
