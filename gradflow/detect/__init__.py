"""Detectors, their composition, and the causes behind what they find. Pure functions over records."""

from gradflow.detect.attention import collapsed_attention, growing_logits, saturated_attention
from gradflow.detect.attention_depth import collapsed_rank, idle_branches
from gradflow.detect.attention_heads import redundant_heads, unbalanced_attention
from gradflow.detect.bottleneck import bottleneck
from gradflow.detect.causes import explain, find_causes
from gradflow.detect.compose import Detector, all_of, check_detectors, detect, only, remap, without
from gradflow.detect.dead import dead
from gradflow.detect.defaults import default_detectors
from gradflow.detect.depth import needs_depth
from gradflow.detect.exploding import exploding
from gradflow.detect.numerical import numerical
from gradflow.detect.policy import (
    collapsed_policy,
    deterministic_policy,
    misscaled_deviation,
    renormalised_policy,
)
from gradflow.detect.policy_heads import conflicting_heads, dominant_value, starved_policy
from gradflow.detect.saturation import saturation
from gradflow.detect.through_time import amplifying, fading, gated
from gradflow.detect.unstable import unstable
from gradflow.detect.vanishing import vanishing

__all__ = [
    "Detector",
    "all_of",
    "amplifying",
    "bottleneck",
    "check_detectors",
    "collapsed_attention",
    "collapsed_policy",
    "collapsed_rank",
    "conflicting_heads",
    "dead",
    "default_detectors",
    "detect",
    "deterministic_policy",
    "dominant_value",
    "explain",
    "exploding",
    "fading",
    "find_causes",
    "gated",
    "growing_logits",
    "idle_branches",
    "misscaled_deviation",
    "needs_depth",
    "numerical",
    "only",
    "redundant_heads",
    "remap",
    "renormalised_policy",
    "saturated_attention",
    "saturation",
    "starved_policy",
    "unbalanced_attention",
    "unstable",
    "vanishing",
    "without",
]
