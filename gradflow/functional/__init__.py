"""The only code that calls a model: pure calls, probes, per-layer gradients, and the run over batches."""

from gradflow.functional.analyze import analyze, analyze_custom, graph_of
from gradflow.functional.gradient_field import VectorField, field_jacobian, vector_field
from gradflow.functional.jacobian import Jacobian
from gradflow.functional.jacobian_records import Gain, Spectrum
from gradflow.functional.layer_jacobian import (
    LayerFunction,
    jacobian_between,
    layer_function,
    layer_gain,
    layer_jvp,
    layer_spectrum,
    layer_vjp,
)
from gradflow.functional.layers import layers
from gradflow.functional.per_sample import (
    GradientNoise,
    LayerNoise,
    gradient_noise,
    per_sample_gradients,
)
from gradflow.functional.probes import probe
from gradflow.functional.reverse import effective_rank
from gradflow.functional.scale import GradientScale, gradient_scale
from gradflow.functional.state import call

__all__ = [
    "Gain",
    "GradientNoise",
    "GradientScale",
    "Jacobian",
    "LayerFunction",
    "LayerNoise",
    "Spectrum",
    "VectorField",
    "analyze",
    "analyze_custom",
    "call",
    "effective_rank",
    "field_jacobian",
    "gradient_noise",
    "gradient_scale",
    "graph_of",
    "jacobian_between",
    "layer_function",
    "layer_gain",
    "layer_jvp",
    "layer_spectrum",
    "layer_vjp",
    "layers",
    "per_sample_gradients",
    "probe",
    "vector_field",
]
