"""Remedies: fixes as values, which remedies a cause calls for, and their trial on copies of a model.

What a remedy is stands in `remedy.py`, how a model is changed by the names of its parts in `surgery.py`;
`kinds/` holds the remedies that gradflow knows, `choosing/` tells which of them a cause's recommended actions
stand for, `trials/` runs them. May import everything down to `diagnosis`.
"""

from gradflow.remedies.choosing.choice import first_action, remedies_for
from gradflow.remedies.kinds.blocks import pre_norm, skip_round, wider
from gradflow.remedies.kinds.data import inputs_standardised, larger_batches
from gradflow.remedies.kinds.domains import divisors_bounded, guarded
from gradflow.remedies.kinds.functions import (
    attached,
    bounded_exponents,
    cooled,
    flattened,
    inputs_with_gradient,
    left_out,
    loss_of_logits,
    reparametrised,
    smooth,
    straight_through,
    wider_precision,
)
from gradflow.remedies.kinds.initialisation import (
    Init,
    biased,
    initialised,
    kaiming,
    keeping,
    like_siblings,
    orthogonal_recurrence,
    queries_divided,
    rescaled,
)
from gradflow.remedies.kinds.optimizing import (
    all_held,
    clipped,
    epsilon,
    loss_times,
    no_decay,
    own_rate,
    plain_adam,
    rate_times,
    steady_rates,
    warmed_up,
)
from gradflow.remedies.kinds.starts import parameters_times, rows_revived, scale_kept, small_steps
from gradflow.remedies.kinds.structure import (
    activation,
    bounded_output,
    gated,
    group_norm,
    less_dropout,
    norm_before,
    norm_behind,
    norm_epsilon,
    output_times,
    standardised,
    without,
)
from gradflow.remedies.remedy import Remedy, on_model, on_optimizer
from gradflow.remedies.trials.trial import try_remedies

__all__ = [
    "Init",
    "Remedy",
    "activation",
    "all_held",
    "attached",
    "biased",
    "bounded_exponents",
    "bounded_output",
    "clipped",
    "cooled",
    "divisors_bounded",
    "epsilon",
    "first_action",
    "flattened",
    "gated",
    "group_norm",
    "guarded",
    "initialised",
    "inputs_standardised",
    "inputs_with_gradient",
    "kaiming",
    "keeping",
    "larger_batches",
    "left_out",
    "less_dropout",
    "like_siblings",
    "loss_of_logits",
    "loss_times",
    "no_decay",
    "norm_before",
    "norm_behind",
    "norm_epsilon",
    "on_model",
    "on_optimizer",
    "orthogonal_recurrence",
    "output_times",
    "own_rate",
    "parameters_times",
    "plain_adam",
    "pre_norm",
    "queries_divided",
    "rate_times",
    "remedies_for",
    "reparametrised",
    "rescaled",
    "rows_revived",
    "scale_kept",
    "skip_round",
    "small_steps",
    "smooth",
    "standardised",
    "steady_rates",
    "straight_through",
    "try_remedies",
    "warmed_up",
    "wider",
    "wider_precision",
    "without",
]
