"""Pipelines: what to measure, and which detectors judge it."""

from gradflow.pipelines.automatic import automatic
from gradflow.pipelines.flow import Pipeline, flow
from gradflow.pipelines.policy import policy
from gradflow.pipelines.precision import precision
from gradflow.pipelines.recurrent import recurrent
from gradflow.pipelines.transformer import transformer

__all__ = ["Pipeline", "automatic", "flow", "policy", "precision", "recurrent", "transformer"]
