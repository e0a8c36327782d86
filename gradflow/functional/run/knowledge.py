"""What the last outputs of a run are worth: the loss is asked once more, of guesses made of them.

NOTE [Guesses]
A guess has everything of an output but the knowledge which sample it belongs to. `shuffled` gives each
sample the output of another one, so it is as sure, as large and as varied as the model is; `averaged` gives
all the mean; `silent` gives zeros. An output without a gradient beside others with one (a teacher's) is a
target, and stays. Where the loss is below zero, it is asked as well of outputs that are
four times as large; above zero there may be probabilities among them, which would be none, and some losses
refuse those. Several outputs (two views, an image and its text) are shuffled each in its own way. The rows
are samples where there are enough of them, else samples and positions together. The order is drawn from a
generator of its own, so that no random state of the user's moves. A loss that needs the graph of its
outputs (a gradient penalty, a residual of a differential equation) cannot be asked. Of one that the model
computes, the loss function is asked that gave it, if one alone did, of what that took. While it is asked of
the outputs as they are, what it does with them is heard; see `heard`. Where a mean for all samples costs what
the outputs do, although these differ, it is asked of larger ones as well: a critic's loss is linear in them
and may ask for no more than means, another loss sees nothing else. Where that mean costs next to nothing,
it is asked of another answer for all, drawn at random: if that costs as little, outputs are held against one
another alone.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from gradflow.functional.model.trees import iter_tensors, map_floats, map_tensors, private_copy
from gradflow.functional.reverse.constants import asked_apart, held_at_zero, merely_added
from gradflow.functional.reverse.floors import floors
from gradflow.functional.run.program import Before, Program
from gradflow.functional.run.step import Kept, Request
from gradflow.functional.tap.heard import Choices, Heard
from gradflow.records import KnowledgeRecord

_LOUDER = 4.0
_FEW = 8  # samples below which positions are shuffled as well
_VARIED = 0.05  # part of the outputs that must differ, for a mean of them to be something else
_MUCH_LOUDER = 16.0
_TO_ITSELF = ("Exp", "Div")  # what is exactly one, of things that are equal: a ratio to what does not move
_LITTLE = 0.2  # of the loss, at or below which an answer for all meets it
_NEARER = (0.5, 0.125, 0.03125)
_LOG = logging.getLogger(__name__)


def knowledge(program: Program, request: Request, kept: Kept | None, loss: float) -> KnowledgeRecord | None:
    """Return what the outputs of a step are worth, or None where that cannot be told.

    Args:
        program: what the step ran on.
        request: the step.
        output: the model's, as leaves that require a gradient where they had one; None if it was not kept.
        loss: of the step.
    """
    output = None if kept is None else kept.value
    rows = _Rows.of(output)
    if kept is None or rows is None or rows.number < 2:
        return None
    generator = torch.Generator().manual_seed(rows.number)

    def shuffled(flat: Tensor) -> Tensor:
        return flat[_derangement(rows.number, generator).to(flat.device)]

    def averaged(flat: Tensor) -> Tensor:
        return flat.mean(0, keepdim=True).expand_as(flat)

    def loss_of(change: Callable[[Tensor], Tensor]) -> float:
        before.restore(program)
        guess = map_floats(
            lambda at, tensor: rows.changed(tensor, change) if at in told else tensor,
            private_copy(Tensor.clone, output),
        )
        return float(kept.loss_of(guess))

    def loss_of_parts(moved: Callable[[int, Tensor], Tensor]) -> float:
        before.restore(program)
        return float(kept.loss_of(map_floats(moved, private_copy(Tensor.clone, output))))

    told = _told(output)
    made = zip(iter_tensors(output), kept.ends, strict=True)
    made = [(t, end) for t, end in made if t.dtype.is_floating_point and rows.fit(t)]
    parts = [part for part, _ in made]
    variations = [_variation(t.detach().reshape(rows.number, -1), end) for t, end in made]
    try:
        with torch.no_grad(), _asking(program) as before, before.again(program):
            own = private_copy(Tensor.clone, output)
            with Heard(own, rows.number) as heard:
                heard.hear_whole(float(kept.loss_of(own)))
            asked = [_asked(loss_of, change) for change in (shuffled, averaged, torch.zeros_like)]
            guesses = [guess for guess, _ in asked]
            louder = loss_of(lambda flat: _LOUDER * flat) if loss < 0 else math.nan
            drawn = _drawn(loss_of, loss, guesses)
            raised = asked_apart(loss_of_parts, loss, output, told)
            agreeing = _asks_for_agreement(loss_of, loss, guesses[1])
            by_mean = _sees_means(loss_of, (loss, *guesses), max(variations, default=0.0))
    except Exception as error:  # a loss that takes nothing but the model's own outputs
        _LOG.debug("the loss cannot be asked of guesses: %r", error)
        return None
    guesses = [guess if 2 * left >= heard.alternatives else math.nan for guess, left in asked]
    constants = _constants(program, kept)
    guessed = loss > 0.2 * _least(guesses)
    far = guessed and guesses[2] > 0 and not heard.scored
    return KnowledgeRecord(
        step=request.step,
        loss=loss,
        shuffled=guesses[0],
        averaged=guesses[1],
        silent=guesses[2],
        louder=louder,
        drawn=drawn,
        num_samples=rows.number,
        shapes=[tuple(part.shape) for part in parts],
        variations=variations,
        scales=[float(part.detach().double().square().mean().sqrt()) for part in parts],
        odds=heard.odds,
        misgiven=(*heard.misgiven, *(["nothing but one another"] if agreeing else [])),
        crossed=heard.crossed,
        by_mean=by_mean,
        raised=[raised.get(id(part), math.nan) for part in parts] if raised else (),
        against=heard.against,
        lone=_lone(program, kept) if far else math.nan,
        constants=constants,
        floors=_floors(program, kept, heard.scored) if guessed else {},
    )


def _asked(loss_of: Callable[..., float], change: Callable[[Tensor], Tensor]) -> tuple[float, int]:
    """Return the loss of a guess, and how many alternatives it is left by the loss; see NOTE [Alternatives
    left out] in heard.py."""
    with Choices() as heard:
        loss = loss_of(change)
    return loss, heard.alternatives


@contextlib.contextmanager
def _asking(program: Program) -> Iterator[Before]:
    """Ask the loss once more, without its warnings: what that moves is put back at the end. Yields the state
    from which it is asked."""
    before, held = Before.of(program, look=False), program.module_state()
    try:
        with program.state.swapped(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield before
    finally:
        held.restore()


def _told(output: Any) -> set[int]:
    """Return the positions of what a model itself tells: of its outputs those with a gradient, all if none.

    What comes without one beside them, a teacher's answer or a mask, is what they are held against.
    """
    every, learned = set[int](), set[int]()

    def note(at: int, tensor: Tensor) -> Tensor:
        every.add(at)
        if tensor.requires_grad:
            learned.add(at)
        return tensor

    map_floats(note, output)
    return learned or every


def _least(guesses: Sequence[float]) -> float:
    return min((guess for guess in guesses if guess > 0), default=math.inf)


_CLAMPS = ("Clamp", "Hardtanh")
_BOUNDED = ("Sigmoid", "Tanh", "Relu", "Softplus", "Exp", "Hard", "Clamp", "Softsign", "Mul", "Div")


def _floors(program: Program, kept: Kept, scored: bool) -> dict[str, float]:
    """Return the lowest losses of outputs that are free, and of those in a range; see `floors`.

    It is asked of what a bounded function has made, or a multiple of that, and that alone has a graph: what
    else the model puts out are targets.
    """
    made = [(t, end) for t, end in zip(iter_tensors(kept.value), kept.ends, strict=True) if t.requires_grad]
    if len(made) != 1 or not made[0][1].startswith(_BOUNDED) or not made[0][0].is_floating_point():
        return {}
    output, end = made[0]

    def loss_of(guess: Tensor) -> Tensor:
        whole = map_tensors(lambda t: guess.to(t.dtype) if t.requires_grad else t, kept.value)
        with before.again(program), torch.enable_grad():
            return kept.loss_of(whole)

    try:
        with _asking(program) as before:
            return floors(loss_of, output, scored=scored, clamped=end.startswith(_CLAMPS))
    except Exception as error:  # outputs that it does not take, or a loss without a slope
        _LOG.debug("the loss cannot be followed down: %r", error)
        return {}


def _constants(program: Program, kept: Kept) -> tuple[str, ...]:
    """Return the outputs that the loss merely adds, and those that are held at zero; see `merely_added` and
    `held_at_zero`."""
    output, parts = kept.value, list[Tensor]()
    map_tensors(lambda tensor: (parts.append(tensor), tensor)[1], output)
    if len(parts) < 2 or all(part.requires_grad and bool(part.any()) for part in parts):
        return ()

    def loss_of(guess: Sequence[Tensor]) -> Tensor:
        left = iter(guess)
        with before.again(program):
            return kept.loss_of(map_tensors(lambda _: next(left), output))

    try:
        with _asking(program) as before:
            with torch.enable_grad():
                added = merely_added(loss_of, parts)
            zero = held_at_zero(loss_of, parts, kept.stepped)
    except Exception as error:  # outputs that it does not take, or a loss without a slope
        _LOG.debug("the loss cannot be asked of constants: %r", error)
        return ()
    told = [*(("added", i) for i in added), *(("zero", i) for i in zero)]
    return tuple(f"{kind} {tuple(parts[i].shape)}" for kind, i in told)


def _lone(program: Program, kept: Kept) -> float:
    """Return how many times the slope of the loss at one column of an output is that at the next, by their
    root mean squares over all else; the most of all outputs with columns, NaN without any.

    It is asked where targets may be far off: zeros cost something, and are no even scores."""
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[-1].clone()  # a loss may change what it is given in place

    try:
        with _asking(program) as before, before.again(program), torch.enable_grad():
            loss = kept.loss_of(map_tensors(leaf, kept.value))
            slopes = torch.autograd.grad(loss, leaves, allow_unused=True)
    except Exception as error:  # outputs that it does not take, or a loss without a slope
        _LOG.debug("the loss has no slope at its outputs: %r", error)
        return math.nan
    found = [_over_the_next(s) for s in slopes if s is not None and not s.is_complex() and s.dim() > 1]
    return max((times for times in found if math.isfinite(times)), default=math.nan)


def _over_the_next(slope: Tensor) -> float:
    columns = slope.detach().double().movedim(1 if slope.dim() > 3 else -1, 0).flatten(1).square().mean(1)
    if len(columns) < 2:
        return math.nan
    largest, next_one = columns.sqrt().topk(2).values.tolist()
    return largest / next_one if next_one > 0 else math.nan


def _drawn(loss_of: Callable[..., float], loss: float, guesses: Sequence[float]) -> float:
    """Return the lowest loss of outputs that are drawn towards their mean, where a loss asks only how samples
    differ, and these cost no less than all alike; NaN where not.

    What differs may be of use at a smaller scale: a softmax over likenesses that is too sharp costs more than
    an even one, and less once they are smaller, if those that belong together are nearer at all.
    """
    _, averaged, silent = guesses
    if not (math.isclose(averaged, silent, rel_tol=1e-5) and 0 < averaged <= loss):
        return math.nan

    def nearer(part: float) -> float:
        return loss_of(lambda flat: flat.mean(0) + part * (flat - flat.mean(0)))

    return min(map(nearer, _NEARER))


def _asks_for_agreement(loss_of: Callable[..., float], loss: float, averaged: float) -> bool:
    """Whether any answer that is the same for all samples meets a loss, to a fifth of what the outputs cost:
    their mean, one that is drawn at random, as large as they are, and its opposite.

    A loss that holds outputs against one another alone asks no more of them. One that holds them against
    targets is met by one answer where targets are alike, and by those alone; one that asks which of two
    numbers is larger, by an answer or by its opposite. Outputs of one shape get the same."""
    if not abs(averaged) <= _LITTLE * loss:  # rounding leaves less than nothing
        return False

    def drawn(flat: Tensor, sign: float) -> Tensor:
        generator = torch.Generator().manual_seed(flat[0].numel())
        row = torch.randn(flat[0].shape, generator=generator, dtype=torch.float64)
        size = flat.double().square().mean().sqrt()
        return (sign * size * row.to(size.device)).to(flat.dtype).expand_as(flat)

    return all(abs(loss_of(functools.partial(drawn, sign=sign))) <= _LITTLE * loss for sign in (1.0, -1.0))


def _sees_means(loss_of: Callable[..., float], known: Sequence[float], varied: float) -> bool:
    """Whether a loss sees no more of outputs than their mean over the samples, and is not linear in them.

    Outputs that differ little cost what their mean does wherever the loss is as good as straight: so it is
    asked of outputs that are many times as large, and of their mean; and of outputs that differ as much, with
    the mean that they have: a hinge may be straight for all of them, and bends between those.

    Args:
        loss_of: of changed outputs.
        known: of the outputs, of shuffled ones, of their mean, of zeros.
        varied: the part of the outputs that differs between samples.
    """
    loss, silent = known[0], known[3]
    if varied < _VARIED or not all(math.isclose(guess, loss, rel_tol=1e-5) for guess in known[1:3]):
        return False
    more = loss_of(lambda flat: _MUCH_LOUDER * flat)
    mean = loss_of(lambda flat: _MUCH_LOUDER * flat.mean(0, keepdim=True).expand_as(flat))
    line = silent + _MUCH_LOUDER * (loss - silent)
    linear = math.isclose(more, line, rel_tol=1e-2, abs_tol=1e-6 * abs(loss))
    if not (math.isfinite(more) and math.isclose(more, mean, rel_tol=1e-5)) or linear:
        return False
    apart = loss_of(lambda flat: flat.mean(0) + _MUCH_LOUDER / varied * (flat - flat.mean(0)))
    return math.isclose(apart, loss, rel_tol=1e-3)


@attrs.frozen
class _Rows:
    """What the rows of an output are: over how many leading axes they run, and their number."""

    axes: int
    number: int

    @classmethod
    def of(cls, output: Any) -> _Rows | None:
        """Return the rows of an output; None where it holds no floating-point tensor with any."""
        first = next((t for t in iter_tensors(output) if t.dtype.is_floating_point and t.dim()), None)
        if first is None:
            return None
        axes = 2 if first.shape[0] < _FEW and first.dim() == 3 else 1
        return cls(axes, first.shape[:axes].numel())

    def fit(self, tensor: Tensor) -> bool:
        """Whether a tensor has these rows; an auxiliary scalar has not."""
        return tensor.dim() >= self.axes and tensor.shape[: self.axes].numel() == self.number

    def changed(self, tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Return a tensor with its rows changed, or as it is where it has others."""
        if not self.fit(tensor):
            return tensor
        return change(tensor.reshape(self.number, *tensor.shape[self.axes :])).reshape(tensor.shape)


def _variation(rows: Tensor, end: str) -> float:
    """The part of a matrix (rows × features) that differs between its rows; NaN where it is zero, or is one
    throughout by its make, which is known by the autograd node that made it."""
    wide, norm = rows.double(), torch.linalg.vector_norm
    size = float(norm(wide))
    if end.startswith(_TO_ITSELF) and bool((wide == 1).all()):
        return math.nan
    return float(norm(wide - wide.mean(0))) / size if size > 0 else math.nan


def _derangement(number: int, generator: torch.Generator) -> Tensor:
    """Return an order in which no row keeps its place: along a random ring, each takes the next one's."""
    ring = torch.randperm(number, generator=generator)
    order = torch.empty_like(ring)
    order[ring] = ring.roll(1)
    return order
