"""Pipelines: what to measure, and which detectors judge it."""

from gradflow.pipelines.flow import Pipeline, flow

__all__ = ["Pipeline", "flow"]
