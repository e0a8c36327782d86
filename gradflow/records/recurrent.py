"""What is measured of a recurrent layer over time, and `ReservoirDynamics`, its short form."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import attrs
import numpy as np

from gradflow.records.fields import NAN, Floats, Ints, array_field, float_field, mapping_field, to_tuple

REMEMBERED = 1e-2  # of the peak: what a step must still get to count into the memory


@attrs.frozen(kw_only=True)
class GateRecord:
    """The values of one gate over all samples, steps and units. Arrays have shape (measured steps,).

    Args:
        name: `input`, `forget`, `candidate`, `output` (LSTM); `reset`, `update`, `candidate` (GRU), where
            `update` is PyTorch's z, the share of the old state that is held on to; `state` (a plain tanh).
        mean: mean value.
        saturated_share: share of values whose derivative is below 1 percent of the largest it can have.
        idle_share: share of values that are saturated and, over the whole sequence, amount to less than a
            tenth of a step: min(g, 1 − g) · steps < 0.1. NaN for `candidate` and `state`.
    """

    name: str
    mean: Floats = array_field()
    saturated_share: Floats = array_field()
    idle_share: Floats = array_field()


@attrs.frozen(kw_only=True)
class RecurrentLevelRecord:
    """One level of a recurrent layer in one direction. The first axis of arrays is that of measured steps.

    Profiles are in the order in which the level reads, and end at the last step of each sample that the
    loss's gradient arrives at: steps after that one (padding) do not count. A profile's entry is √(n · mean
    over the samples that reach so far of ‖·‖²), n being the number of samples: the norm over the batch where
    all are equally long.

    Args:
        level: `l0`, `l1`, `l0_reverse`, ..., as in the names of its parameters.
        state_size: numbers in the state s: h, or h and c.
        gradient_profile: ‖∂L/∂h_t‖, (measured steps, steps). NaN in front where a batch was shorter.
        state_profile: ‖∂L/∂s_t‖, likewise; another profile for an LSTM only, where s is (h, c).
        readout_profile: ‖∂ℓ/∂s_t‖ for what the loss reads at the last step alone; ends there.
        profile_error: relative standard error of the profiles, where some samples of the batch stand for all:
            the largest of their entries within a percent of the peak; 0 where all were measured.
        spectral_radius: largest eigenvalue modulus of A_t = ∂s_{t+1}/∂s_t, mean over sampled t and samples.
        spectral_error: standard error of that mean; NaN for a single one.
        spectral_residual: largest relative residual of these; 0 where the Jacobian was taken whole.
        lyapunov: mean log growth per step of a tangent vector carried along the sequence, mean over samples.
        lyapunov_error: standard error of that mean; NaN for a single sample.
        hidden_rms: rms of h_t, (measured steps, steps), in the order of reading; empty if not tracked.
        cell_rms: rms of c_t, the same; empty if there is no c.
        gates: one record per gate.
    """

    level: str
    state_size: int = 0
    gradient_profile: Floats = array_field(axes=2)
    state_profile: Floats = array_field(axes=2)
    readout_profile: Floats = array_field(axes=2)
    profile_error: Floats = array_field(unknown="gradient_profile")
    spectral_radius: Floats = array_field()
    spectral_error: Floats = array_field(unknown="spectral_radius")
    spectral_residual: Floats = array_field()
    lyapunov: Floats = array_field()
    lyapunov_error: Floats = array_field(unknown="lyapunov")
    hidden_rms: Floats = array_field(axes=2)
    cell_rms: Floats = array_field(axes=2)
    gates: tuple[GateRecord, ...] = attrs.field(default=(), converter=to_tuple)

    def gate(self, name: str) -> GateRecord | None:
        """Return the record of a gate, or None if it has none of that name."""
        return next((gate for gate in self.gates if gate.name == name), None)


@attrs.frozen(kw_only=True)
class RecurrenceRecord:
    """One call of a recurrent layer, or one loop over a recurrent cell. Arrays have shape (measured steps,).

    Args:
        name: name of the layer call; of a loop, that of its first call.
        module: qualified name of the module.
        type: class name of the module.
        kind: `tanh`, `relu`, `lstm` or `gru`.
        loop: whether it is a loop over a cell.
        measured_steps: which steps of the run were measured.
        num_steps: steps of the longest sequence.
        num_samples: on how many samples of the batch it was measured.
        read_share: share of the steps whose output the loss reads directly, not through later steps.
        heard_share: share of the steps, up to the last one that is read, whose gradient at W_ih x_t + b_ih in
            the lowest level is at least 1e-6 of the sample's largest. The others are lost to rounding in the
            gradient of W_ih, a sum over steps. Both directions count together.
        state_error: relative difference of the states from those that the model itself has computed.
        subnormal_share: share of its steps, over levels and samples, at which the numbers of ∂L/∂s_t are
            subnormal (float32: below 1.2e-38, and not zero), on a CPU that takes them as they are; of a loop,
            in the gradient of what is read at the last step alone. Else 0.
        cost: what measuring it took: multiplications by the layer's weights, over those of its own forward
            and reverse pass.
        still_end: at how many steps, up to the last one that is read, the input stays the same, and the same
            as that of other samples: padding. The median over the samples; 1 where it changes from step to
            step, 0 where samples do not share their last input. NaN of a loop.
        told_heard: how far inputs go with what the loss asks of the layer, sample by sample, at steps that
            get 1e-5 of a sample's largest gradient or more; in standard deviations above what shuffled
            samples give. NaN where every step does, and of sequences of different lengths.
        told_faint: the same at the other steps, up to the last one with a gradient.
        told_share: how many of these steps are of the former kind, as a share.
        levels: in PyTorch's order.
        loss_share: see `TransformerRecord`.
    """

    name: str
    module: str
    type: str
    kind: str
    loop: bool = False
    measured_steps: Ints = array_field(np.int64)
    num_steps: Ints = array_field(np.int64)
    num_samples: Floats = array_field(unknown="measured_steps")
    read_share: Floats = array_field()
    heard_share: Floats = array_field()
    state_error: Floats = array_field()
    subnormal_share: Floats = array_field(unknown="measured_steps")
    cost: Floats = array_field(unknown="measured_steps")
    still_end: Floats = array_field(unknown="measured_steps")
    told_heard: Floats = array_field(unknown="measured_steps")
    told_faint: Floats = array_field(unknown="measured_steps")
    told_share: Floats = array_field(unknown="measured_steps")
    levels: tuple[RecurrentLevelRecord, ...] = attrs.field(converter=to_tuple)
    loss_share: float = float_field(NAN)


def mean_profile(profiles: Floats) -> Floats:
    """Return the mean of profiles over the measured steps, shape (steps,)."""
    if profiles.size == 0:
        return np.empty(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a step that no batch has is NaN
        return np.nanmean(profiles, axis=0)


def depth(profile: Floats, share: float = REMEMBERED) -> int:
    """Return how many steps back from the end the furthest entry of at least `share` of the peak is.

    1 is the last step alone; 0 where nothing arrives at all.

    >>> depth(np.array([0.001, 0.1, 1.0]))
    2
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        peak = np.nanmax(profile) if len(profile) else math.nan
    kept = np.flatnonzero(profile >= share * peak)
    return len(profile) - int(kept[0]) if peak > 0 and len(kept) else 0


def decay_rate(profile: Floats) -> float:
    """Return 1 − first/last of a profile: the share of the gradient that is lost on its way back.

    Negative where it grows; NaN where nothing arrives at the end.

    >>> decay_rate(np.array([0.03, 0.2, 1.0]))
    0.97
    """
    return float(1.0 - profile[0] / profile[-1]) if len(profile) and profile[-1] > 0 else math.nan


@attrs.frozen(kw_only=True)
class ReservoirDynamics:
    """How a recurrent model carries its state, and the gradient, over time: means over the measured steps.

    Of a layer of several levels or directions, and of a model of several layers: `spectral_radius` and
    `lyapunov` are means over them, and the rest is that of the one with the largest `gradient_decay_rate`.

    Args:
        spectral_radius: largest eigenvalue modulus of the state transition ∂s_{t+1}/∂s_t.
        memory_depth: steps back from the end within which the gradient profile reaches 1 percent of its peak.
        recall_depth: the same of the readout profile: how far what is read at the last step reaches back.
        gradient_decay_rate: 1 − first/last of the gradient profile: 0.97 where 97 percent are lost.
        lyapunov: mean log growth per step of a tangent vector: below zero it forgets, above it is chaotic.
        gradient_profile: ‖∂L/∂h_t‖ by step, in the order in which the layer reads.
        readout_profile: ‖∂ℓ/∂s_t‖ of the last read step alone.
        layers: by name of the layer call, its own dynamics; in these, by level (`l0`, `l1_reverse`, ...).
    """

    spectral_radius: float = float_field(NAN)
    memory_depth: int = 0
    recall_depth: int = 0
    gradient_decay_rate: float = float_field(NAN)
    lyapunov: float = float_field(NAN)
    gradient_profile: Floats = array_field()
    readout_profile: Floats = array_field()
    layers: Mapping[str, ReservoirDynamics] = mapping_field()

    @classmethod
    def of(cls, recurrences: Sequence[RecurrenceRecord]) -> ReservoirDynamics:
        """Return the short form of what was measured; `FlowRecord.recurrences` holds it in full."""
        return cls._joined(
            {r.name: cls._joined({v.level: cls._of(v) for v in r.levels}) for r in recurrences}
        )

    @classmethod
    def _of(cls, level: RecurrentLevelRecord) -> ReservoirDynamics:
        profile, readout = mean_profile(level.gradient_profile), mean_profile(level.readout_profile)
        return cls(
            spectral_radius=_mean(level.spectral_radius),
            memory_depth=depth(profile),
            recall_depth=depth(readout),
            gradient_decay_rate=decay_rate(profile),
            lyapunov=_mean(level.lyapunov),
            gradient_profile=profile,
            readout_profile=readout,
        )

    @classmethod
    def _joined(cls, parts: Mapping[str, ReservoirDynamics]) -> ReservoirDynamics:
        if not parts:
            return cls(gradient_profile=np.empty(0), readout_profile=np.empty(0))

        def loss(part: ReservoirDynamics) -> float:
            return -math.inf if math.isnan(part.gradient_decay_rate) else part.gradient_decay_rate

        return attrs.evolve(
            max(parts.values(), key=loss),
            spectral_radius=_mean(np.array([part.spectral_radius for part in parts.values()])),
            lyapunov=_mean(np.array([part.lyapunov for part in parts.values()])),
            layers=parts,
        )


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan
