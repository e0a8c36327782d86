"""What a model's outputs are worth: their loss against that of guesses made of the very same outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs

from gradflow.records.fields import NAN, float_field, mapping_field, to_floats, to_tuple


@attrs.frozen(kw_only=True)
class KnowledgeRecord:
    """The loss of a batch's outputs, and of what they would be without knowledge of the inputs.

    A loss near `shuffled` is that of a model which guesses: its outputs fit other samples as well as their
    own. A small part of it is that of one which knows. A gradient that is gone, or an output that is sure,
    means one thing in the former and another in the latter. All are taken at the end of the run, without
    gradients, from one forward pass.

    Args:
        step: the step whose outputs they are.
        loss: of the outputs as they are.
        shuffled: of the same outputs, each given to another sample.
        averaged: of their mean over the samples, given to all of them.
        silent: of zeros in their place. For a cross entropy over k classes that is ln k. Of guesses that
            make the loss leave out most of the alternatives that it holds outputs against, all are NaN.
        louder: where the loss is below zero, that of outputs four times as large: of a loss that falls as its
            outputs grow it is four times as low, and sixteen times where it falls with their square.
        drawn: where all constants cost the same, zeros too, and no more than the outputs: the lowest loss of
            these outputs drawn towards their mean, to parts of what they differ by; NaN where not asked.
        num_samples: number of rows that were shuffled.
        variations: of every floating-point output that has such rows, ‖Y − mean row‖_F / ‖Y‖_F: 0 where it is
            the same for all of them. NaN where it is zero, and where it is one throughout as an exponential
            of zeros or a quotient of equal numbers: a ratio of probabilities to themselves, whose value
            tells nothing, and whose gradient is all that the loss asks for.
        shapes: theirs, in the same order.
        scales: their root mean squares.
        odds: smallest and largest of the targets that binary cross entropies of PyTorch were given, which are
            probabilities by their meaning; empty where none was called.
        misgiven: what functions of PyTorch were given in the place of what they take: `probabilities as
            scores` (a cross entropy), `odds as scores` (one of yes and no that
            makes them of scores), `probabilities as logarithms`, `scores as logarithms`, `probabilities
            over samples` (a softmax along the batch), `scores masked but for one` (softmaxes that have
            nothing to choose among, in nine of ten rows and more), `an error with a minus` (as the whole
            loss); and `nothing but one another`, where outputs are held against no target: their mean for all
            costs at most a fifth of what they do, and so does any other answer for all, drawn at random.
        crossed: shapes of an output and of what the loss set it against crosswise, each element against all,
            although they are equally many, as (N, 1) and (N,); empty where it did not.
        by_mean: whether the loss sees no more of the outputs than their mean over the samples, and is not
            linear in them.
        raised: where the loss asks for each of two outputs of one shape by itself (what changes of both do to
            it add up, as of a mean and a spread that a penalty draws to where they belong), by how much it
            rises as normal numbers of size one are added to each alone, in the order of `shapes`; else empty.
        against: where the loss squashes a sum or mean over all rows (a sigmoid, a log-sigmoid, a tanh), and
            its slope there is below 1 percent of the largest, the share of rows whose own part has the other
            sign; NaN where it does not.
        lone: how many times the slope of the loss at one column of an output is that at the next (along the
            last axis, of images along that of channels), by root mean squares; the most of all outputs.
            NaN where the loss takes scores, or zeros cost nothing.
        constants: outputs that no weight moves the loss by, with their shape, as `added (64, 2)`: those
            without a graph that the loss adds up, and does nothing else with, as no slope at another output
            depends on them, and it has a slope at them (`added`); and those with a graph that are zero for
            every sample, while others are not, in a loss that bends with them and is not met there, or by a
            rectifier's derivative, which is zero whatever the weights are (`zero`).
        floors: the lowest losses found for outputs that are free, under "", and for those from `0 to 1`,
            `-1 to 1`, `above 0`, or, of a clamp, `as clamped`, where the outputs keep that range; empty where
            that was not asked.
    """

    step: int
    loss: float = float_field(NAN)
    shuffled: float = float_field(NAN)
    averaged: float = float_field(NAN)
    silent: float = float_field(NAN)
    louder: float = float_field(NAN)
    drawn: float = float_field(NAN)
    num_samples: int = 0
    variations: tuple[float, ...] = attrs.field(default=(), converter=to_floats)
    shapes: tuple[tuple[int, ...], ...] = attrs.field(default=(), converter=to_tuple)
    scales: tuple[float, ...] = attrs.field(default=(), converter=to_floats)
    odds: tuple[float, ...] = attrs.field(default=(), converter=to_floats)
    misgiven: tuple[str, ...] = attrs.field(default=(), converter=to_tuple)
    crossed: tuple[tuple[int, ...], ...] = attrs.field(default=(), converter=to_tuple)
    by_mean: bool = False
    raised: tuple[float, ...] = attrs.field(default=(), converter=to_floats)
    against: float = float_field(NAN)
    lone: float = float_field(NAN)
    constants: tuple[str, ...] = attrs.field(default=(), converter=to_tuple)
    floors: Mapping[str, float] = mapping_field()

    @property
    def ignorance(self) -> float:
        """The smallest loss of the guesses that is above zero: what it costs to know nothing of the inputs.

        Outputs that are wrong and large make a shuffled loss as large as one likes; zeros do not.
        """
        known = [x for x in (self.shuffled, self.averaged, self.silent) if math.isfinite(x)]
        return min((x for x in known if x > 0), default=min(known, default=NAN))

    @property
    def share_left(self) -> float:
        """`loss` over `shuffled`: 1 guesses, 0 knows; NaN where the losses are not positive."""
        if self.loss >= 0 and self.shuffled > 0 and math.isfinite(self.shuffled):
            return self.loss / self.shuffled
        return NAN
