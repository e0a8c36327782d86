"""The detectors that run where no others are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gradflow.detect.flow.bottleneck import bottleneck
from gradflow.detect.flow.dead import dead
from gradflow.detect.flow.exploding import exploding
from gradflow.detect.flow.numerical import numerical
from gradflow.detect.flow.saturation import saturation
from gradflow.detect.flow.unstable import unstable
from gradflow.detect.flow.vanishing import vanishing
from gradflow.detect.parts.chance import stray_dropout
from gradflow.detect.parts.codes import idle_codes
from gradflow.detect.parts.copies import copied_parts
from gradflow.detect.parts.draws import drowned_codes
from gradflow.detect.parts.held import held_at_zero
from gradflow.detect.parts.norms import misscaled_norms, swallowed_norms
from gradflow.detect.parts.quotients import tiny_divisors
from gradflow.detect.parts.siblings import uneven_siblings
from gradflow.detect.parts.sight import leaking_attention
from gradflow.detect.parts.turns import still_sinusoids
from gradflow.detect.parts.twins import copied_rows, copied_units
from gradflow.detect.processes.differing import partly_used, unequal_processes
from gradflow.detect.processes.layers import unfed_experts, unsynchronised_norms
from gradflow.detect.processes.odd import odd_process, same_data
from gradflow.detect.reach.deaf import deaf_functions
from gradflow.detect.updates.decay import decaying_weights
from gradflow.detect.updates.fading import fading_rates
from gradflow.detect.updates.slow import slow_updates
from gradflow.detect.updates.unheld import unheld_parameters
from gradflow.records import FlowRecord, Issue


def default_detectors(
    *,
    vanishing_threshold: float = 1e-6,
    exploding_threshold: float = 10.0,
    dead_threshold: float = 0.9,
    unstable_cv_threshold: float = 3.0,
) -> tuple[Callable[[FlowRecord], Iterable[Issue]], ...]:
    """Return one detector of each of the seven types, and those of parts, of updates and of processes.

    Args:
        vanishing_threshold: see `vanishing`.
        exploding_threshold: see `exploding`.
        dead_threshold: see `dead`.
        unstable_cv_threshold: see `unstable`.

    >>> all(callable(detector) for detector in default_detectors())
    True
    """
    return (
        numerical(),
        dead(dead_threshold),
        vanishing(vanishing_threshold),
        exploding(exploding_threshold),
        saturation(),
        unstable(unstable_cv_threshold),
        bottleneck(),
        uneven_siblings(),
        deaf_functions(),
        copied_units(),
        copied_parts(),
        copied_rows(),
        swallowed_norms(),
        misscaled_norms(),
        leaking_attention(),
        stray_dropout(),
        held_at_zero(),
        tiny_divisors(),
        idle_codes(),
        drowned_codes(),
        still_sinusoids(),
        slow_updates(),
        fading_rates(),
        decaying_weights(),
        unheld_parameters(),
        unequal_processes(),
        partly_used(),
        odd_process(),
        same_data(),
        unsynchronised_norms(),
        unfed_experts(),
    )
