"""The only code that calls a model: pure calls, probes, per-layer gradients, and the run over batches."""

from gradflow.functional.analyze import analyze, analyze_custom, graph_of
from gradflow.functional.attention.measurement import attention, attention_weights
from gradflow.functional.attention.statistics import (
    HeadStatistics,
    attention_entropy,
    attention_statistics,
    head_distances,
    position_residual,
)
from gradflow.functional.jacobian.gradient_field import VectorField, field_jacobian, vector_field
from gradflow.functional.jacobian.jacobian import Jacobian
from gradflow.functional.jacobian.layer_jacobian import (
    LayerFunction,
    jacobian_between,
    layer_function,
    layer_gain,
    layer_jvp,
    layer_spectrum,
    layer_vjp,
)
from gradflow.functional.jacobian.per_sample import (
    GradientNoise,
    LayerNoise,
    gradient_noise,
    per_sample_gradients,
)
from gradflow.functional.jacobian.records import Gain, Spectrum
from gradflow.functional.measurement import Measurement, Session, gradients
from gradflow.functional.model.layers import layers
from gradflow.functional.model.state import call
from gradflow.functional.policy.gradients import HeadGradients, head_gradients
from gradflow.functional.policy.measurement import policy_heads
from gradflow.functional.policy.statistics import ActionStatistics, action_entropy, action_statistics
from gradflow.functional.precision.measurement import precision
from gradflow.functional.recurrent.cells import Cell, Level, level_of_cell, levels_of
from gradflow.functional.recurrent.measurement import recurrence
from gradflow.functional.recurrent.transition import lyapunov_exponents, spectral_radii, state_jacobians
from gradflow.functional.recurrent.unroll import hidden_gradients, unroll
from gradflow.functional.reverse.ranks import effective_rank
from gradflow.functional.scale import GradientScale, gradient_scale
from gradflow.functional.tap.probes import probe
from gradflow.functional.updates.curvature import curvature, curvature_along
from gradflow.functional.updates.figures import UpdateFigures, remembered, update_figures

__all__ = [
    "ActionStatistics",
    "Cell",
    "Gain",
    "GradientNoise",
    "GradientScale",
    "HeadGradients",
    "HeadStatistics",
    "Jacobian",
    "LayerFunction",
    "LayerNoise",
    "Level",
    "Measurement",
    "Session",
    "Spectrum",
    "UpdateFigures",
    "VectorField",
    "action_entropy",
    "action_statistics",
    "analyze",
    "analyze_custom",
    "attention",
    "attention_entropy",
    "attention_statistics",
    "attention_weights",
    "call",
    "curvature",
    "curvature_along",
    "effective_rank",
    "field_jacobian",
    "gradient_noise",
    "gradient_scale",
    "gradients",
    "graph_of",
    "head_distances",
    "head_gradients",
    "hidden_gradients",
    "jacobian_between",
    "layer_function",
    "layer_gain",
    "layer_jvp",
    "layer_spectrum",
    "layer_vjp",
    "layers",
    "level_of_cell",
    "levels_of",
    "lyapunov_exponents",
    "per_sample_gradients",
    "policy_heads",
    "position_residual",
    "precision",
    "probe",
    "recurrence",
    "remembered",
    "spectral_radii",
    "state_jacobians",
    "unroll",
    "update_figures",
    "vector_field",
]
