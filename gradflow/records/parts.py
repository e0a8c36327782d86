"""What is measured of parts that a model repeats, so that they can be held against each other."""

from __future__ import annotations

import attrs

from gradflow.records.fields import Floats, array_field, float_field, to_tuple


@attrs.frozen(kw_only=True)
class BlockRecord:
    """A block of a model that repeats it: modules of one class and with parameters of one kind, in one list.

    Arrays have shape (looks,); NaN where it did not run, or changed its input in place.

    Args:
        name: qualified name of the block.
        group: qualified name of the list that holds it and its siblings.
        type: its class name.
        passes: whether a way leads from what enters to what leaves past all weights, as a skip connection
            does; None where the first step does not show it.
        kept: ⟨x, y⟩ / ⟨x, x⟩ of what enters and what leaves: about 1 where the input goes past its branches.
        growth: root mean square of y over that of x.
        added: root mean square of y − x.
    """

    name: str
    group: str
    type: str
    passes: bool | None = None
    kept: Floats = array_field()
    growth: Floats = array_field()
    added: Floats = array_field()


@attrs.frozen(kw_only=True)
class NormRecord:
    """A norm layer and what enters it. Arrays have shape (looks,).

    Args:
        name: qualified name of the module.
        type: its class name.
        epsilon: what it adds to the variance (or to the mean square).
        variance: what it adds that to, the median over what it normalises; NaN where it did not run.
        smallest_gain: of its gains, in the first step; NaN where it has none.
        largest_gain: the same.
    """

    name: str
    type: str
    epsilon: float = float_field()
    variance: Floats = array_field()
    smallest_gain: float = float_field(float("nan"))
    largest_gain: float = float_field(float("nan"))


@attrs.frozen(kw_only=True)
class MatrixRecord:
    """The sizes of parts of a weight matrix, and whether they look as they were drawn.

    Args:
        name: name of the parameter.
        rms: of its thirds by rows, where it has three times as many rows as columns, or of all of it; shape
            (looks, 3) or (looks, 1).
        kurtosis: mean fourth power over squared mean square: 3 where drawn from a normal distribution, 1.8
            from a uniform one; of frozen ones only.
        dispersion: variance of its rows' squared norms over what independent elements of this kurtosis
            have, or of its columns', if that is more: about 1 as drawn; of frozen ones only.
    """

    name: str
    rms: Floats = array_field(axes=2)
    kurtosis: float = float_field(float("nan"))
    dispersion: float = float_field(float("nan"))


@attrs.frozen(kw_only=True)
class TwinsRecord:
    """Slices of a parameter along an axis that are equal to the bit, at the first step.

    Args:
        name: name of the parameter.
        axis: 0 for rows, 1 for columns.
        num_slices: how many slices there are.
        num_different: how many remain if of equal ones but one is kept.
        gradient_apart: largest distance of the gradients of two equal slices, over the larger one's norm;
            NaN where no gradient reaches them.
    """

    name: str
    axis: int
    num_slices: int
    num_different: int
    gradient_apart: float = float_field()


@attrs.frozen(kw_only=True)
class RowsRecord:
    """Rows of one sample that the last layer gives the same for, though what enters the model differs.

    Of the last step that was looked at.

    Args:
        layer: the layer call.
        num_rows: rows of a sample.
        num_different: how many of them differ, as a mean over the samples.
        torn_share: part of the gradient, in squares, that cancels between equal rows.
        since: the layer call from which on these rows are equal, of those that give as many; "" if not known.
        from_the_start: whether no layer call before that gives as many rows that differ.
    """

    layer: str
    num_rows: int
    num_different: float = float_field()
    torn_share: float = float_field()
    since: str = ""
    from_the_start: bool = False


@attrs.frozen(kw_only=True)
class QuotientRecord:
    """A division of the last step that was looked at, by numbers that carry no gradient.

    Args:
        layer: the layer call whose output is divided, as it is or as an operation made it.
        small_share: how many divisors are below 1e-4 of the largest one, as a share.
        smallest: the smallest of them; infinity if there are none.
        excess: mean of what they give over that of what the others give, both taken as magnitudes: 1 where
            what is divided is as small as they are; NaN if there are none.
        cancelled: of one divisor that is the sum or mean of numbers with either sign, |Σ d| / √(Σ d²): about
            1 where signs are by chance; the other fields are NaN then. NaN of other divisors.
    """

    layer: str
    small_share: float = float_field(float("nan"))
    smallest: float = float_field(float("nan"))
    excess: float = float_field(float("nan"))
    cancelled: float = float_field(float("nan"))


@attrs.frozen(kw_only=True)
class ScanRecord:
    """A tensor that a loop of operations took apart one step at a time, in the last step that was looked at.

    Args:
        name: qualified name of the module in which it did so; "" for the model, or the loss.
        num_steps: steps of the loop.
        shape: of the tensor.
        faded_share: share of the steps whose gradient is below 1e-6 of the largest, and not zero, or zero
            only as the decay has come to the end of float32.
    """

    name: str
    num_steps: int
    shape: tuple[int, ...] = attrs.field(default=(), converter=to_tuple)
    faded_share: float = float_field()


@attrs.frozen(kw_only=True)
class ChoiceRecord:
    """A table without gradient from which a model picks rows by what it computes: the codes of a quantiser.

    Args:
        layer: name of the module in which that is done; "" for the model, or the loss.
        num_codes: rows of the table.
        num_picked: how many of them were picked in any of the steps that were looked at.
        num_choices: how many choices there were in those.
        by_step: how many were picked in each of those steps.
    """

    layer: str
    num_codes: int
    num_picked: int
    num_choices: int
    by_step: tuple[int, ...] = attrs.field(default=(), converter=to_tuple)


@attrs.frozen(kw_only=True)
class DrawRecord:
    """A code that is drawn: random numbers that are added to what a layer gives. Arrays have shape (looks,).

    Args:
        layer: the layer call that gives it.
        signal: root mean square of what it gives less its mean over the samples.
        noise: root mean square of what is added.
        pull: cosine of the gradient that comes to what it gives, and of that itself: 1 where a step down the
            loss does nothing but shrink it, as the pull to a prior does; NaN where none comes, or all by way
            of the code with its noise.
        given: whether the noise came with the batch: what is added has no gradient but that of its scale.
    """

    layer: str
    signal: Floats = array_field()
    noise: Floats = array_field()
    pull: Floats = array_field(unknown="signal")
    given: bool = False


@attrs.frozen(kw_only=True)
class AnswersRecord:
    """What a layer says as a softmax of its own outputs, a row to a sample. Arrays have shape (looks,).

    Args:
        layer: the layer call that gives the scores.
        num_alternatives: among how many it chooses.
        largest: the mean over the samples of the probability of that alternative which gets most: one over
            their number where all get alike, 1 where every sample gets the same for certain.
    """

    layer: str
    num_alternatives: int
    largest: Floats = array_field()


@attrs.frozen(kw_only=True)
class EndsRecord:
    """A sigmoid or tanh that is at its ends for the most part, in the last step that was looked at.

    Args:
        layer: the activation module's layer call, or the one whose output feeds the function.
        op: `sigmoid` or `tanh`.
        wanted_share: of the gradient that comes to what is at an end, the share (of its magnitude) by which a
            step down the loss leads further out: 1 where the end is what is asked for, 0 where all of it is
            to come back, a half where it is asked for nothing; NaN where no gradient comes.
    """

    layer: str
    op: str
    wanted_share: float = float_field()


@attrs.frozen(kw_only=True)
class TurnsRecord:
    """Sinusoids of angles without a gradient, in the last step that was looked at.

    Args:
        layer: qualified name of the module that takes them; "" for the model.
        num_features: how many frequencies there are.
        span: largest less smallest angle of the feature where that is most, over samples and positions.
        num_different: how many different angles that feature has.
    """

    layer: str
    num_features: int
    span: float = float_field()
    num_different: int


@attrs.frozen(kw_only=True)
class DropoutRecord:
    """A dropout layer, or a module that calls dropout as a function and goes on dropping in eval mode.

    Args:
        name: qualified name of the module.
        type: its class name.
        p: the share that it drops.
        in_eval: whether it was seen to drop in eval mode.
    """

    name: str
    type: str
    p: float = float_field()
    in_eval: bool = False


@attrs.frozen(kw_only=True)
class SightRecord:
    """What a module with self-attention, or the whole model, lets its outputs see, in the first step.

    Args:
        name: name of the module's call.
        type: class name of the module.
        future: of the gradient from the middle position at all others, the share at later ones (a ratio of
            norms): 0 where the future is hidden, 1 where the past is; NaN where nothing is known.
        padding: root mean square of the gradient at padding over that at words, from all words; NaN where no
            padding is known.
        padding_told: whether the model is told of padding by a mask among its inputs.
        whole: whether it is of the whole model, whose targets are its inputs shifted by one, or
        own: the very inputs, each at its place.
        ordered: of the whole model, whether it tells the order of its inputs: False where equal tokens of one
            sequence get equal outputs, wherever they stand.
    """

    name: str
    type: str
    future: float = float_field(float("nan"))
    padding: float = float_field(float("nan"))
    padding_told: bool = False
    whole: bool = False
    own: bool = False
    ordered: bool = True


@attrs.frozen(kw_only=True)
class SamplesRecord:
    """Of which samples an output tells: where the gradient from one row of the outputs arrives.

    Args:
        layer: the first layer call whose output has a row for each sample.
        rows: their number.
        own: the part of the gradient's square that is at the sample's own row: the median of three.
        both_sides: whether some of it is at rows before and some at rows behind it.
        mixed: the last layer call of which no more than that is at its own row.
        clean: the first one behind it of which more is; empty where there is none.
    """

    layer: str
    rows: int
    own: float
    both_sides: bool
    mixed: str
    clean: str = ""


@attrs.frozen(kw_only=True)
class PartsRecord:
    """What was measured of a model's parts.

    Args:
        steps: the steps that were looked at.
        blocks: the blocks that it repeats, in order.
        norms: its norm layers.
        matrices: weight matrices inside blocks, and frozen ones.
        twins: parameters of which at least half of the slices are copies.
        rows: rows of the last layer that are equal, though what enters the model differs.
        quotients: divisions outside of layers, in the order of execution.
        choices: tables without gradient from which the model picks by itself.
        draws: codes that the model draws, by where random numbers are added.
        answers: what layers say by a softmax of what they give, of which the gradient is taken.
        ends: sigmoids and tanhs at their ends, and whether the loss wants them there.
        turns: sinusoids that embed what is given.
        scans: what loops of operations take apart step by step, where no module is called for each.
        sights: which positions each self-attention lets its outputs see.
        samples: where outputs tell of other samples more than of their own.
        dropouts: dropout layers, and what drops in eval mode.
    """

    steps: tuple[int, ...] = attrs.field(default=(), converter=to_tuple)
    blocks: tuple[BlockRecord, ...] = attrs.field(default=(), converter=to_tuple)
    norms: tuple[NormRecord, ...] = attrs.field(default=(), converter=to_tuple)
    matrices: tuple[MatrixRecord, ...] = attrs.field(default=(), converter=to_tuple)
    twins: tuple[TwinsRecord, ...] = attrs.field(default=(), converter=to_tuple)
    rows: tuple[RowsRecord, ...] = attrs.field(default=(), converter=to_tuple)
    quotients: tuple[QuotientRecord, ...] = attrs.field(default=(), converter=to_tuple)
    choices: tuple[ChoiceRecord, ...] = attrs.field(default=(), converter=to_tuple)
    draws: tuple[DrawRecord, ...] = attrs.field(default=(), converter=to_tuple)
    answers: tuple[AnswersRecord, ...] = attrs.field(default=(), converter=to_tuple)
    ends: tuple[EndsRecord, ...] = attrs.field(default=(), converter=to_tuple)
    turns: tuple[TurnsRecord, ...] = attrs.field(default=(), converter=to_tuple)
    scans: tuple[ScanRecord, ...] = attrs.field(default=(), converter=to_tuple)
    sights: tuple[SightRecord, ...] = attrs.field(default=(), converter=to_tuple)
    samples: tuple[SamplesRecord, ...] = attrs.field(default=(), converter=to_tuple)
    dropouts: tuple[DropoutRecord, ...] = attrs.field(default=(), converter=to_tuple)

    def joined(self, other: PartsRecord) -> PartsRecord:
        """Return what both hold; of what both have measured, that of the other."""
        held = {field.name: getattr(other, field.name) for field in attrs.fields(PartsRecord)}
        return attrs.evolve(self, **{name: value for name, value in held.items() if value})
