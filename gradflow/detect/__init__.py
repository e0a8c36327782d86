"""Detectors, their composition, and the causes behind what they find. Pure functions over records."""

from gradflow.detect.bottleneck import bottleneck
from gradflow.detect.causes import explain, find_causes
from gradflow.detect.compose import Detector, all_of, check_detectors, detect, only, remap, without
from gradflow.detect.dead import dead
from gradflow.detect.defaults import default_detectors
from gradflow.detect.depth import needs_depth
from gradflow.detect.exploding import exploding
from gradflow.detect.numerical import numerical
from gradflow.detect.saturation import saturation
from gradflow.detect.unstable import unstable
from gradflow.detect.vanishing import vanishing

__all__ = [
    "Detector",
    "all_of",
    "bottleneck",
    "check_detectors",
    "dead",
    "default_detectors",
    "detect",
    "explain",
    "exploding",
    "find_causes",
    "needs_depth",
    "numerical",
    "only",
    "remap",
    "saturation",
    "unstable",
    "vanishing",
    "without",
]
