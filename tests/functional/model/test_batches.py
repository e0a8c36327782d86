"""From batches to calls: what can be passed, in which order things happen, and what every error says."""

from __future__ import annotations

import random
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, BatchFeature

from gradflow.errors import (
    EmptyBatchesError,
    LossError,
    ModelInputError,
    ModelNotCalledError,
    NoTrainableParametersError,
)
from gradflow.functional import analyze, analyze_custom, layer_gain
from tests.functional.naive import naive_step
from tests.functional.snapshots import content, difference, process

X, Y, T = torch.randn(6, 3), torch.randn(6, 2), torch.tensor([0, 1, 1, 0, 1, 0])


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


class Pair(nn.Module):
    """Takes two tensors, by position or by name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.a(left) - self.b(right)


def mean_square(y: Tensor) -> Tensor:
    return y.square().mean()


# --------------------------------------------------------------------------------------- sources


def test_every_kind_of_source_gives_the_same_batches() -> None:
    batches = [(X, Y), (2 * X, Y), (3 * X, Y)]

    class Sequence:
        def __getitem__(self, i: int) -> Any:
            return batches[i]

    class Iterable:
        def __iter__(self) -> Iterator[Any]:
            return iter(batches)

    drawn = iter(batches)
    sources: list[Any] = [
        batches, tuple(batches), iter(batches), (b for b in batches), Iterable(), Sequence(),
        lambda: next(drawn),
        DataLoader(TensorDataset(torch.cat([X, 2 * X, 3 * X]), torch.cat([Y, Y, Y])), batch_size=6),
    ]  # fmt: skip
    expected = [float(naive_step(linear(), x, lambda y: F.mse_loss(y, Y)).loss) for x, _ in batches]
    for source in sources:
        record = analyze(linear(), source, F.mse_loss, steps=3)
        np.testing.assert_allclose(record.losses, expected, rtol=1e-6, err_msg=str(source))


def test_a_source_that_ends_is_an_honest_shorter_run() -> None:
    record = analyze(linear(), [X, X], mean_square, steps=5)
    assert record.steps == len(record.losses) == len(record[""].grad_norm) == 2
    assert record.provenance.requested_steps == 5
    assert "The batches ended after 2 of 5 steps." in record.provenance.notes
    left = iter([X, X])
    assert analyze(linear(), lambda: next(left), mean_square, steps=5).steps == 2
    exact = analyze(linear(), [X] * 5, mean_square, steps=5)
    assert not any("ended" in note for note in exact.provenance.notes)


def test_no_more_is_drawn_than_is_used() -> None:
    drawn = iter([X] * 5)
    analyze(linear(), drawn, mean_square, steps=3)
    assert len(list(drawn)) == 2


def test_one_draw_one_call_and_one_loss_a_step_in_that_order_and_never_ahead() -> None:
    events: list[str] = []

    class Telling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            events.append("call")
            return super().forward(x)

    def draw() -> Tensor:
        events.append("draw")
        return X

    def loss(y: Tensor) -> Tensor:
        events.append("loss")
        return mean_square(y)

    model = Telling(3, 2)
    for options in ({}, {"detail": "full"}, {"optimizer": torch.optim.Adam(model.parameters())}):
        events.clear()
        analyze(
            model, draw, loss, steps=4, progress=lambda done, of: events.append(f"{done} of {of}"), **options
        )  # type: ignore[arg-type]
        assert events == [event for i in range(1, 5) for event in ("draw", "call", "loss", f"{i} of 4")]


def test_closures_may_share_the_latest_target() -> None:
    shared: dict[str, Tensor] = {}
    targets = iter([Y, 2 * Y, 3 * Y])

    def draw() -> Tensor:
        shared["y"] = next(targets)
        return X

    record = analyze(linear(), draw, lambda out: F.mse_loss(out, shared["y"]), steps=3)
    expected = [float(F.mse_loss(linear()(X).detach(), k * Y)) for k in (1, 2, 3)]
    np.testing.assert_allclose(record.losses, expected, rtol=1e-6)


# --------------------------------------------------------------------------------------- batches

Point = namedtuple("Point", "left right")


@pytest.mark.parametrize(
    "batch",
    [
        (X, 2 * X),
        [X, 2 * X],
        Point(X, 2 * X),
        {"left": X, "right": 2 * X},
        OrderedDict(right=2 * X, left=X),
    ],
    ids=["tuple", "list", "named tuple", "dict", "ordered dict"],
)
@pytest.mark.parametrize("with_target", [False, True])
def test_a_batch_is_unpacked_as_its_kind_says(batch: Any, with_target: bool) -> None:
    expected = naive_step(Pair(), (X, 2 * X), lambda y: F.mse_loss(y, Y))
    if with_target:
        record = analyze(Pair(), [(batch, Y)], F.mse_loss)
    else:
        record = analyze(Pair(), [batch], lambda y: F.mse_loss(y, Y))
    np.testing.assert_allclose(record.losses, float(expected.loss), rtol=1e-6)
    for parameter in record.parameters:
        np.testing.assert_allclose(parameter.grad_norm, expected.parameter_norm(parameter.name), rtol=1e-6)


def test_a_packed_sequence_is_one_input() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 4, batch_first=True)

        def forward(self, sequence: nn.utils.rnn.PackedSequence) -> Tensor:
            return self.rnn(sequence)[1]

    x = torch.randn(2, 5, 3)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True)
    record = analyze(Model(), [packed], lambda h: h.square().sum())
    assert record["rnn"].reached.all()
    with_target = analyze(Model(), [(packed, torch.zeros(1, 2, 4))], F.mse_loss)
    assert with_target["rnn"].reached.all()


def test_what_is_no_tensor_in_a_batch_is_passed_on_as_it_is() -> None:
    seen: list[Any] = []

    class Model(nn.Linear):
        def forward(self, x: Tensor, flag: str, table: dict[str, int], nothing: None) -> Tensor:
            seen.append((flag, table, nothing))
            return super().forward(x)

    table = {"a": 1}
    analyze(Model(3, 2), [(X, "yes", table, None)], mean_square)
    assert seen == [("yes", {"a": 1}, None)]


# --------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        F.cross_entropy,
        nn.NLLLoss(),
        lambda output, target: F.cross_entropy(output, target),
    ],
    ids=["module", "function", "another module", "lambda"],
)
def test_a_loss_of_two_arguments_takes_pairs(loss: Callable[..., Tensor]) -> None:
    record = analyze(linear(), [(X, T)] * 2, loss, steps=2)
    np.testing.assert_allclose(record.losses, float(loss(linear()(X).detach(), T)), rtol=1e-6)


def test_a_loss_with_options_is_counted_by_what_it_needs() -> None:
    def one(output: Tensor, weight: float = 2.0, *, power: int = 2) -> Tensor:
        return weight * output.pow(power).mean()

    def two(output: Tensor, target: Tensor, weight: float = 2.0) -> Tensor:
        return weight * F.mse_loss(output, target)

    def all_optional(output: Tensor | None = None) -> Tensor:
        assert output is not None
        return output.square().mean()

    class Loss:
        def __call__(self, output: Tensor, target: Tensor) -> Tensor:
            return F.mse_loss(output, target)

        def method(self, output: Tensor) -> Tensor:
            return output.square().mean()

    y = linear()(X).detach()
    for loss in (one, all_optional, lambda *outputs: outputs[0].square().mean(), Loss().method):
        np.testing.assert_allclose(analyze(linear(), [X], loss).losses, float(loss(y)), rtol=1e-6)
    for loss in (two, Loss()):
        np.testing.assert_allclose(analyze(linear(), [(X, Y)], loss).losses, float(loss(y, Y)), rtol=1e-6)


@dataclass
class HuggingFaceLike:
    loss: Tensor | None
    logits: Tensor


OWN: dict[str, Callable[[Tensor], Any]] = {
    "a scalar": lambda y: y.square().mean(),
    "one element": lambda y: y.square().mean().reshape(1, 1),
    "an attribute": lambda y: HuggingFaceLike(y.square().mean(), y),
    "a key": lambda y: {"loss": y.square().mean(), "logits": y},
    "the first of a tuple": lambda y: (y.square().mean(), y),
}


@pytest.mark.parametrize("kind", OWN)
def test_without_a_loss_the_models_own_is_taken(kind: str) -> None:
    class Model(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return OWN[kind](super().forward(x))

    torch.manual_seed(0)
    model = Model(3, 2)
    record = analyze(model, [X])
    expected = naive_step(linear(), X, mean_square)
    np.testing.assert_allclose(record.losses, float(expected.loss), rtol=1e-6)
    np.testing.assert_allclose(
        record.parameter("weight").grad_norm, expected.parameter_norm("weight"), rtol=1e-6
    )


def test_the_own_loss_of_a_mapping_batch_with_labels() -> None:
    class Model(nn.Linear):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> HuggingFaceLike:
            logits = super().forward(x)
            loss = None if labels is None else F.cross_entropy(logits, labels)
            return HuggingFaceLike(loss, logits)

    assert analyze(Model(3, 2), [{"x": X, "labels": T}]).steps == 1
    with pytest.raises(
        LossError, match=r"its output holds none: HuggingFaceLike with .*float32\[6, 2\].*labels"
    ):
        analyze(Model(3, 2), [{"x": X}])


def test_a_loss_of_one_element_is_a_scalar() -> None:
    record = analyze(linear(), [X], lambda y: y.square().mean().reshape(1, 1))
    np.testing.assert_allclose(record.losses, float(mean_square(linear()(X).detach())), rtol=1e-6)


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (X, r"batches is one Tensor, which looks like a single batch\. Wrap it in a list"),
        ({"x": X}, r"batches is one dict, which looks like a single batch"),
        (
            (X, T),
            r"batches is a tuple of tensors \(0: float32\[6, 3\], 1: int64\[6\]\), .* Wrap it: `\[batch\]`",
        ),
        (7, r"batches is a int\. Pass a function that returns the next batch"),
        (None, r"batches is a NoneType\. Pass a function"),
        (lambda: None, r"the batch drawn is None\. Pass a function that returns the next batch"),
        ([None], r"the batch drawn is None"),
        (lambda: iter([X]), r"returned an iterator, not a batch\. Pass the iterator itself"),
    ],
)
def test_batches_that_are_none(batches: Any, message: str) -> None:
    with pytest.raises(ModelInputError, match=message):
        analyze(linear(), batches, mean_square)


@pytest.mark.parametrize(
    "empty", [[], iter([]), (), DataLoader([])], ids=["list", "iterator", "tuple", "loader"]
)
def test_no_batch_at_all(empty: Any) -> None:
    name = type(empty).__name__
    with pytest.raises(EmptyBatchesError, match=rf"batches \({name}\) gave no batch at all.*used up before"):
        analyze(linear(), empty, mean_square)


def test_a_used_up_function_gives_no_batch() -> None:
    left: Iterator[Tensor] = iter([])
    with pytest.raises(EmptyBatchesError, match=r"batches \(function\) gave no batch"):
        analyze(linear(), lambda: next(left), mean_square)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (X, r"a batch must be a pair \(inputs, target\); got a Tensor of 6: float32\[6, 3\]"),
        ((X, X, T), r"got a tuple of 3: 0: float32\[6, 3\], 1: .*Regroup it, `\(\(x1, x2\), y\)`"),
        ({"x": X, "y": T}, r"got a dict of 2: x: float32\[6, 3\], y: int64\[6\]"),
        (3.5, r"got a float: no tensor \(float\)"),
    ],
)
def test_a_loss_of_two_arguments_and_a_batch_that_is_no_pair(batch: Any, message: str) -> None:
    with pytest.raises(ModelInputError, match=message):
        analyze(linear(), [batch], nn.CrossEntropyLoss())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (torch.tensor(1.0), r"loss_fn is a Tensor, which cannot be called\. Pass the function"),
        ("mse", r"loss_fn is a str, which cannot be called"),
        (lambda: X.sum(), r"cannot tell how to call the loss <lambda>: .* and this one takes 0"),
        (lambda a, b, c: a, r"it must take one argument \(the output\) or two .* and this one takes 3"),
        (nn.TripletMarginLoss(), r"cannot tell how to call the loss TripletMarginLoss: .* takes 3"),
        (torch.sum, r"cannot tell how to call the loss sum: .*has no signature\. Wrap it"),
    ],
)
def test_losses_that_cannot_be_called(loss: Any, message: str) -> None:
    with pytest.raises(ModelInputError, match=message):
        analyze(linear(), [X], loss)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda y: y.square(), r"the loss has shape \(6, 2\), not one number\. Reduce it: `\.mean\(\)`"),
        (lambda y: y.mean().item(), r"the loss is a float, not a tensor\. .*no `\.item\(\)`"),
        (lambda y: None, r"the loss is a NoneType, not a tensor"),
        (lambda y: (y > 0).sum(), r"the loss has dtype torch\.int64; a gradient needs a floating-point loss"),
        (
            lambda y: y.detach().mean(),
            r"the loss carries no gradient: .*`\.detach\(\)`, `\.data`, `\.item\(\)`",
        ),
        (lambda y: y.argmax(1).float().mean(), r"the loss carries no gradient: .*`argmax`"),
        (lambda y: torch.zeros(()), r"the loss carries no gradient: .*a loss of targets only"),
        (lambda y: y.new_empty(0), r"the loss has shape \(0,\), not one number"),
    ],
)
@pytest.mark.parametrize("transform", ["fused", "vjp"])
def test_losses_that_are_none(loss: Any, message: str, transform: Any) -> None:
    with pytest.raises(LossError, match=message):
        analyze(linear(), [X], loss, transform=transform)


def test_a_model_whose_output_holds_no_loss() -> None:
    with pytest.raises(
        LossError, match=r"loss_fn=None means .* its output holds none: Tensor with float32\[6, 2\]"
    ):
        analyze(linear(), [X])


def test_a_loss_that_loses_its_gradient_later_is_data_and_no_error() -> None:
    calls = iter(range(9))
    record = analyze(linear(), [X] * 3, lambda y: (y.detach() if next(calls) == 1 else y).mean(), steps=3)
    assert record[""].reached.tolist() == [True, False, True]
    assert record.parameter("weight").reached.tolist() == [True, False, True]


def test_a_model_that_is_none() -> None:
    for model, name in ((nn.Linear, "type"), (lambda x: x, "function"), (None, "NoneType")):
        with pytest.raises(
            ModelInputError, match=rf"model is a {name}, not a torch\.nn\.Module\. Pass the module"
        ):
            analyze(model, [X], mean_square)  # type: ignore[arg-type]
        with pytest.raises(ModelInputError, match=r"not a torch\.nn\.Module"):
            analyze_custom(model, lambda m, step: m(X), mean_square)  # type: ignore[arg-type]


def test_a_model_without_trainable_parameters() -> None:
    frozen = linear().requires_grad_(False)
    with pytest.raises(
        NoTrainableParametersError, match=r"none of the 2 parameters of Linear .*requires_grad_\(True\)"
    ):
        analyze(frozen, [X], mean_square)
    with pytest.raises(NoTrainableParametersError, match=r"none of the 0 parameters of ReLU"):
        analyze(nn.ReLU(), [X], mean_square)


def test_a_closure_that_calls_another_model() -> None:
    other = linear()
    with pytest.raises(
        ModelNotCalledError, match=r"no layer of Linear was called .*must call this very model"
    ):
        analyze_custom(linear(), lambda model, step: other(X), mean_square)


def test_custom_forwards_take_a_function_and_a_loss_of_one_argument() -> None:
    with pytest.raises(ModelInputError, match=r"forward_fn is a Tensor; pass a function of \(model, step\)"):
        analyze_custom(linear(), X, mean_square)  # type: ignore[arg-type]
    with pytest.raises(ModelInputError, match=r"the loss takes the output alone; bind the target in it"):
        analyze_custom(linear(), lambda model, step: model(X), F.mse_loss)


def test_custom_forwards_are_told_the_step() -> None:
    steps: list[int] = []

    def forward(model: nn.Module, step: int) -> Tensor:
        steps.append(step)
        return model(X * (step + 1))

    record = analyze_custom(linear(), forward, mean_square, steps=3)
    assert steps == [0, 1, 2]
    expected = [float(naive_step(linear(), k * X, mean_square).loss) for k in (1, 2, 3)]
    np.testing.assert_allclose(record.losses, expected, rtol=1e-6)
    assert analyze_custom(linear(), lambda model, step: model(X).mean(), steps=1).steps == 1  # its own loss


# ----------------------------------------------------------------------- exceptions of the user's code


def test_an_exception_of_the_model_keeps_its_type_and_tells_where_it_was() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.check = nn.Linear(3, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor, number: Tensor) -> Tensor:
            return self.check(self.fc(x)) if number == 2 else self.fc(x)

    batches = [(X, torch.tensor(k)) for k in range(4)]
    with pytest.raises(
        RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied \(6x3 and 4x2\)"
    ) as caught:
        analyze(Picky(), batches, mean_square)
    (note,) = caught.value.__notes__
    assert note == ("gradflow: raised at step 2 in 'check'; the batch holds 0: float32[6, 3], 1: int64[].")
    assert any(entry.name == "forward" and "Picky" not in entry.name for entry in caught.traceback)


def test_an_exception_that_the_model_caught_is_not_where_another_one_was() -> None:
    class Trying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.wrong = nn.Linear(3, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.wrong(x)
            except RuntimeError:
                return self.fc(x)

    model = Trying()
    record = analyze(model, [X] * 2, mean_square, steps=2)
    assert record["fc"].reached.all()

    def raising(y: Tensor) -> Tensor:
        raise ArithmeticError

    with pytest.raises(ArithmeticError) as caught:
        analyze(model, [X], raising)
    assert caught.value.__notes__ == ["gradflow: raised at step 0; the batch holds float32[6, 3]."]


def test_an_exception_of_the_loss_keeps_its_type_and_tells_the_shapes() -> None:
    class OddError(Exception):
        def __init__(self, a: int, b: int) -> None:
            super().__init__(a, b)

    def raising(y: Tensor, t: Tensor) -> Tensor:
        raise OddError(1, 2)

    for transform in ("fused", "vjp"):
        with pytest.raises(OddError) as caught:
            analyze(linear(), [(X, T)], raising, transform=transform)
        assert caught.value.args == (1, 2)
        assert caught.value.__notes__ == [
            "gradflow: raised at step 0; the batch holds 0: float32[6, 3], 1: int64[6]."
        ]


def test_a_shape_mismatch_in_the_loss_shows_both() -> None:
    with pytest.raises(
        ValueError, match=r"Expected input batch_size \(6\) to match target batch_size \(5\)"
    ) as caught:
        analyze(linear(), [(X, T[:5])], nn.CrossEntropyLoss())
    assert "1: int64[5]" in caught.value.__notes__[0]


def test_an_exception_of_the_source_passes_as_it_is() -> None:
    def draw() -> Tensor:
        raise LookupError("no such file")

    with pytest.raises(LookupError, match="no such file"):
        analyze(linear(), draw, mean_square)


def test_inputs_are_placed_on_the_models_device() -> None:
    # without a second device: `prepared` hands back tensors of the device, copies of all but leaves
    from gradflow.functional.model.batches import prepared

    leaf, sparse = X.clone().requires_grad_(), torch.eye(3).to_sparse()
    placed = prepared({"x": X, "leaf": leaf, "sparse": sparse, "n": 3}, torch.device("cpu"))
    assert torch.equal(placed["x"], X)
    assert placed["x"].data_ptr() != X.data_ptr()
    assert placed["leaf"] is leaf
    assert placed["sparse"] is not sparse
    assert torch.equal(placed["sparse"].to_dense(), torch.eye(3))
    assert placed["n"] == 3
    assert prepared(X, torch.device("meta")).is_meta
    assert not prepared(X, None).is_meta


# ------------------------------------------------------------------------ what drawing batches leaves behind


class Noisy(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Draws each sample from random numbers: torch's, numpy's, Python's and a generator of its own."""

    def __init__(self) -> None:
        self.own = np.random.default_rng(0)

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(3) + float(np.random.rand()) + random.random() + float(self.own.random())


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(Noisy(), batch_size=6, **options)


class Epochs:
    """Iterated anew for every run, it draws from the random numbers before the first batch."""

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(6)
        return iter([X[order], X[order] + np.random.rand()])


class ByIndex:
    """Has no `__iter__`."""

    def __getitem__(self, index: int) -> Tensor:
        if index > 2:
            raise IndexError
        return torch.randn(6, 3)


SOURCES: dict[str, Callable[[], Any]] = {
    "loader": loader,
    "shuffling loader": lambda: loader(shuffle=True),
    "loader with a generator": lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(1)),
    "loader with a sampler's generator": lambda: loader(
        sampler=torch.utils.data.RandomSampler(range(24), generator=torch.Generator().manual_seed(1))
    ),
    "two workers": lambda: loader(shuffle=True, num_workers=2),
    "two workers that are kept": lambda: loader(num_workers=2, persistent_workers=True),
    "an iterable": Epochs,
    "a sequence by index": ByIndex,
    "a function": lambda: lambda: torch.randn(6, 3),
    "a function that makes a loader": lambda: lambda: next(iter(loader(shuffle=True))),
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("fails", [False, True])
def test_drawing_batches_moves_no_random_numbers_and_a_seed_fixes_them(kind: str, fails: bool) -> None:
    model, source = linear(), SOURCES[kind]()

    def states() -> Any:
        parts = [source, getattr(source, "sampler", None), getattr(source, "dataset", None)]
        held = [v for part in parts for v in vars(part or linear).values()]
        return content([v for v in held if isinstance(v, (torch.Generator, np.random.Generator))])[
            2
        ], process()

    def failing(y: Tensor) -> Tensor:
        raise ZeroDivisionError

    before, first = states(), source
    if fails:
        with pytest.raises(ZeroDivisionError):
            analyze(model, source, failing, steps=3, seed=0)
        assert difference(before, states()) == ""
        return
    one = analyze(model, source, mean_square, steps=3)
    assert difference(before, states()) == ""
    seeded = [analyze(model, source, mean_square, steps=3, seed=0).losses.tolist() for _ in range(2)]
    assert difference(before, states()) == ""
    assert seeded[0] == seeded[1]
    assert len(set(seeded[0])) == len(one.losses)  # the batches differ
    assert getattr(first, "_iterator", None) is None


def test_an_iterator_goes_on_where_the_run_left_it() -> None:
    batches = iter([X, X, X, 2 * X])
    analyze(linear(), batches, mean_square, steps=3)
    assert torch.equal(next(batches), 2 * X)


def test_a_class_of_batches_is_told_from_an_instance() -> None:
    with pytest.raises(ModelInputError, match="batches is the class Epochs, not an instance of it"):
        analyze(linear(), Epochs, mean_square)


# --------------------------------------------------------- batches of any class, which a model writes to


class Attributes:
    """Holds tensors in attributes, as a graph does; one refers to the object itself."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.more, self.me = x, {"edges": [x.clone()]}, self


class Slots:
    __slots__ = ("x",)

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Store(MutableMapping):  # type: ignore[type-arg]
    """A mapping that keeps its tensors in a private dict, as a dict of tensors does."""

    def __init__(self, **held: Any) -> None:
        self._held = held

    def __getitem__(self, key: str) -> Any:
        return self._held[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._held[key] = value

    def __delitem__(self, key: str) -> None:
        del self._held[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


@dataclass(frozen=True)
class Frozen:
    x: Tensor


Named = namedtuple("Named", "x")

BATCHES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda x: x, lambda b: b),
    "dict": (lambda x: {"x": x}, lambda b: b["x"]),
    "UserDict": (lambda x: UserDict(x=x), lambda b: b["x"]),
    "BatchEncoding": (lambda x: BatchEncoding({"x": x}), lambda b: b["x"]),
    "BatchFeature": (lambda x: BatchFeature({"x": x}), lambda b: b["x"]),
    "store": (lambda x: Store(x=x), lambda b: b["x"]),
    "ordered dict": (lambda x: OrderedDict(x=x), lambda b: b["x"]),
    "attributes": (Attributes, lambda b: b.x),
    "attributes, deeper": (lambda x: [Attributes(x)], lambda b: b[0].x),
    "slots": (lambda x: (Slots(x),), lambda b: b[0].x),
    "frozen dataclass": (Frozen, lambda b: b.x),
    "named tuple": (Named, lambda b: b.x),
    "array": (lambda x: (x.numpy(),), lambda b: torch.from_numpy(b[0])),
    "packed": (
        lambda x: nn.utils.rnn.pack_padded_sequence(x.view(2, 3, 3), torch.tensor([3, 2]), batch_first=True),
        lambda b: b.data,
    ),
    "sparse": (lambda x: x.to_sparse(), lambda b: b),
}  # fmt: skip


@pytest.mark.parametrize("kind", BATCHES)
def test_a_model_that_writes_to_its_input_leaves_the_batch_alone(kind: str) -> None:
    make, find = BATCHES[kind]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 1)

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            found = [a.x for a in args if isinstance(a, (Attributes, Slots, Frozen, Named))]
            found += [torch.from_numpy(a) for a in args if isinstance(a, np.ndarray)]
            found += [a for a in args if type(a) is Tensor] + list(kwargs.values())
            found += [a.data for a in args if isinstance(a, nn.utils.rnn.PackedSequence)]
            (x,) = found
            x.mul_(2.0)
            return self.fc(x.to_dense() if x.is_sparse else x)

    torch.manual_seed(0)
    batch, model = make(torch.ones(6, 3)), Model()
    before = content(batch)
    losses = analyze(model, [batch] * 3, mean_square).losses
    assert difference(before, content(batch)) == ""
    assert bool((find(batch).to_dense() if kind == "sparse" else find(batch)).eq(1).all())
    expected = float(model.fc(torch.full((6, 3), 2.0)).square().mean().detach())
    np.testing.assert_allclose(losses, [expected] * 3, rtol=1e-6)


def test_lists_without_tensors_in_a_batch_are_copied_as_well() -> None:
    class Popping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 1)

        def forward(self, x: Tensor, names: list[str], table: dict[str, list[int]]) -> Tensor:
            names.pop()
            table["more"] = [1]
            return self.fc(x)

    batch = (X, ["a", "b"], {"some": [0]})
    analyze(Popping(), [batch] * 3, mean_square)
    assert batch[1:] == (["a", "b"], {"some": [0]})


# ------------------------------------------------------------------------------------- options of a run


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss_fn": nn.CrossEntropyLoss}, ModelInputError, "class CrossEntropyLoss, not an instance"),
        ({"loss_fn": HuggingFaceLike}, ModelInputError, "class HuggingFaceLike, not an instance"),
        ({"seed": 2**70}, ValueError, r"seed must be a whole number from -2\*\*63 to 2\*\*64 - 1"),
        ({"seed": -(2**63) - 1}, ValueError, "seed must be a whole number"),
        ({"seed": 1.0}, ValueError, "seed must be a whole number .* got 1.0"),
        ({"seed": "1"}, ValueError, "seed must be a whole number"),
        ({"seed": True}, ValueError, "seed must be a whole number"),
        ({"steps": 2.0}, ValueError, "steps must be a whole number of at least 1, got 2.0"),
        ({"steps": np.int64(0)}, ValueError, "steps must be a whole number of at least 1"),
        ({"progress": 5}, ModelInputError, "progress is 5, which cannot be called"),
        ({"deepen": True}, ModelInputError, "deepen is True, which cannot be called"),
        ({"measurements": 5}, ModelInputError, "measurements holds 5, which is no measurement"),
        ({"measurements": None}, ModelInputError, "measurements holds None, which is no measurement"),
    ],
)
def test_an_option_of_the_wrong_kind_is_told(options: Any, error: type[Exception], message: str) -> None:
    given = {"loss_fn": nn.CrossEntropyLoss(), **options}
    with pytest.raises(error, match=message):
        analyze(linear(), [(X, T)] * 2, **given)


@pytest.mark.parametrize("number", [np.int64, np.uint8, torch.tensor])
def test_whole_numbers_of_any_kind_are_taken(number: Any) -> None:
    model = nn.Sequential(nn.Dropout(0.5), linear())
    plain = analyze(model, [X] * 3, mean_square, steps=2, seed=3)
    assert analyze(model, [X] * 3, mean_square, steps=number(2), seed=number(3)) == plain
    for seed in (-(2**63), 2**64 - 1):
        assert analyze(model, [X], mean_square, seed=seed).steps == 1


@pytest.mark.parametrize("entry", ["analyze", "layer_gain"])
def test_inside_a_transform_of_the_users_wrapped_tensors_are_refused(entry: str) -> None:
    model = linear()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    outer: Any = {"grad": torch.func.grad, "vmap": torch.func.vmap}

    def run(x: Tensor) -> Any:
        return analyze(model, [x], mean_square) if entry == "analyze" else layer_gain(model, "", x)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            run(X)
            return model(X).sum()

    def of_parameters(given: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(Whole(), {f"model.{n}": p for n, p in given.items()}, ())

    def of_batch(x: Tensor) -> Tensor:
        run(x)
        return x.sum()

    message = "belongs to a transform of torch.func .* analyse outside of it"
    with pytest.raises(ModelInputError, match=f"'weight' {message}"):
        outer["grad"](of_parameters)(parameters)
    stacked = {name: torch.stack([p, p]) for name, p in parameters.items()}
    with pytest.raises(ModelInputError, match=f"'weight' {message}"):
        outer["vmap"](of_parameters)(stacked)
    for transform in outer.values():
        with pytest.raises(ModelInputError, match=f"a tensor of the batch {message}"):
            transform(of_batch)(torch.stack([X, X]) if transform is outer["vmap"] else X)
