"""Detectors, their composition, and the causes behind what they find. Pure functions over records."""

from gradflow.detect.attention.attention import collapsed_attention, growing_logits, saturated_attention
from gradflow.detect.attention.depth import collapsed_rank, idle_branches
from gradflow.detect.attention.heads import redundant_heads, unbalanced_attention
from gradflow.detect.attention.stack import incomplete_blocks
from gradflow.detect.causes.causes import explain, find_causes
from gradflow.detect.causes.rules import RULES, Rule
from gradflow.detect.compose import Detector, all_of, check_detectors, detect, only, remap, without
from gradflow.detect.defaults import default_detectors
from gradflow.detect.flow.bottleneck import bottleneck
from gradflow.detect.flow.dead import dead
from gradflow.detect.flow.depth import needs_depth
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
from gradflow.detect.policy.heads import conflicting_heads, dominant_value, starved_policy
from gradflow.detect.policy.policy import (
    collapsed_policy,
    deterministic_policy,
    misscaled_deviation,
    renormalised_policy,
)
from gradflow.detect.precision.overflow import overflowing
from gradflow.detect.precision.scaler import scaler_issues, stuck_scaler
from gradflow.detect.precision.slow import crawling
from gradflow.detect.precision.underflow import underflowing
from gradflow.detect.reach.deaf import deaf_functions
from gradflow.detect.recurrent.crossed import along_samples
from gradflow.detect.recurrent.through_time import amplifying, fading, gated
from gradflow.detect.updates.decay import decaying_weights
from gradflow.detect.updates.fading import fading_rates
from gradflow.detect.updates.rate import asks_for_curves
from gradflow.detect.updates.slow import slow_updates
from gradflow.detect.updates.unheld import unheld_parameters

__all__ = [
    "RULES",
    "Detector",
    "Rule",
    "all_of",
    "along_samples",
    "amplifying",
    "asks_for_curves",
    "bottleneck",
    "check_detectors",
    "collapsed_attention",
    "collapsed_policy",
    "collapsed_rank",
    "conflicting_heads",
    "copied_parts",
    "copied_rows",
    "copied_units",
    "crawling",
    "dead",
    "deaf_functions",
    "decaying_weights",
    "default_detectors",
    "detect",
    "deterministic_policy",
    "dominant_value",
    "drowned_codes",
    "explain",
    "exploding",
    "fading",
    "fading_rates",
    "find_causes",
    "gated",
    "growing_logits",
    "held_at_zero",
    "idle_branches",
    "idle_codes",
    "incomplete_blocks",
    "leaking_attention",
    "misscaled_deviation",
    "misscaled_norms",
    "needs_depth",
    "numerical",
    "only",
    "overflowing",
    "redundant_heads",
    "remap",
    "renormalised_policy",
    "saturated_attention",
    "saturation",
    "scaler_issues",
    "slow_updates",
    "starved_policy",
    "still_sinusoids",
    "stray_dropout",
    "stuck_scaler",
    "swallowed_norms",
    "tiny_divisors",
    "unbalanced_attention",
    "underflowing",
    "uneven_siblings",
    "unheld_parameters",
    "unstable",
    "vanishing",
    "without",
]
