"""From batches to calls: what can be passed, in which order things happen, and what drawing leaves behind."""

from __future__ import annotations

import random
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gradflow.errors import EmptyBatchesError, ModelInputError
from gradflow.functional import analyze
from tests.functional.model.small import Pair, T, X, Y, linear, mean_square
from tests.functional.naive import naive_step
from tests.functional.snapshots import content, difference, process
from tests.models import ANSWERS, GUESSES

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
        steps = [event for i in range(1, 5) for event in ("draw", "call", "loss", f"{i} of 4")]
        assert events[: len(steps)] == steps
        asked = events[len(steps) :]
        assert set(asked) == {"loss"}
        assert GUESSES <= len(asked) <= GUESSES + ANSWERS


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


# --------------------------------------------------------------------------------------- devices


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
