"""The only code that calls a model: pure calls, probes, per-layer gradients, and the run over batches."""

from gradflow.functional.analyze import analyze, analyze_custom, graph_of
from gradflow.functional.layers import layers
from gradflow.functional.probes import probe
from gradflow.functional.reverse import effective_rank
from gradflow.functional.scale import GradientScale, gradient_scale
from gradflow.functional.state import call

__all__ = [
    "GradientScale",
    "analyze",
    "analyze_custom",
    "call",
    "effective_rank",
    "gradient_scale",
    "graph_of",
    "layers",
    "probe",
]
