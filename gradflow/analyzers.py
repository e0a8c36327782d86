"""The class face: what people know from other tools, as thin shells over the functions. No logic here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gradflow.diagnosis import diagnose
from gradflow.errors import NotAnalyzedError
from gradflow.functional.analyze import analyze, analyze_custom
from gradflow.pipelines import flow
from gradflow.records import FlowRecord, Issue, LayerRecord
from gradflow.report import healthy_layers, summary_text


class _LastRecord:
    """Keeps the record of the last run."""

    _record: FlowRecord | None = None

    @property
    def record(self) -> FlowRecord:
        """The record of the last run.

        Raises:
            NotAnalyzedError: if nothing was run yet.
        """
        if self._record is None:
            raise NotAnalyzedError.at(type(self).__name__)
        return self._record


class GradientFlowAnalyzer(_LastRecord):
    """Finds what is wrong with a model's gradient flow.

    Args:
        model: the model; it is left as it is.
        name: how to call it; the class name of the model by default.
        enable_rnn_analyzer: accepted for recurrent models, which need no switch yet.
        enable_circular_flow_analyser: also measure the flow along every edge of the layer graph, for
            divergence, circulation and curl; slower.
        vanishing_threshold: see `gradflow.detect.vanishing`.
        exploding_threshold: see `gradflow.detect.exploding`.
        dead_threshold: see `gradflow.detect.dead`.
        unstable_cv_threshold: see `gradflow.detect.unstable`.

    >>> import torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> analyzer = GradientFlowAnalyzer(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1)))
    >>> issues = analyzer.analyze(lambda: torch.randn(64, 8), lambda y: y.square().mean(), steps=5)
    >>> analyzer.print_summary(issues)
    [OK] No gradient issues found.
    >>> analyzer.get_healthy_layers(issues)
    ['0', '1', '2']
    """

    def __init__(
        self,
        model: nn.Module,
        name: str | None = None,
        enable_rnn_analyzer: bool = False,
        enable_circular_flow_analyser: bool = False,
        vanishing_threshold: float = 1e-6,
        exploding_threshold: float = 10.0,
        dead_threshold: float = 0.9,
        unstable_cv_threshold: float = 3.0,
    ) -> None:
        self.model = model
        self.name = name or type(model).__name__
        self.enable_rnn_analyzer = enable_rnn_analyzer
        self.pipeline = flow(
            vanishing_threshold=vanishing_threshold,
            exploding_threshold=exploding_threshold,
            dead_threshold=dead_threshold,
            unstable_cv_threshold=unstable_cv_threshold,
            detail="full" if enable_circular_flow_analyser else "cheap",
        )

    def analyze(
        self,
        input_fn: Any,
        loss_fn: Callable[..., Any] | None,
        steps: int = 20,
        optimizer: Optimizer | None = None,
    ) -> list[Issue]:
        """Run the model and return the issues, most severe first. The arguments are those of `diagnose`.

        Args:
            input_fn: a zero-argument function that returns the next batch, or an iterable of batches.
            loss_fn: from the model's output to a scalar; None takes the model's own loss.
            steps: how many batches to run at most.
            optimizer: steps copies of the parameters; None holds them fixed.
        """
        report = diagnose(
            self.model,
            input_fn,
            loss_fn,
            steps=steps,
            optimizer=optimizer,
            pipeline=self.pipeline,
        )
        self._record = report.record
        return list(report.issues)

    def print_summary(self, issues: Sequence[Issue]) -> None:
        """Print how many issues there are of each severity, then each of them."""
        print(summary_text(issues))  # noqa: T201 - printing is what it is for

    def get_healthy_layers(self, issues: Sequence[Issue]) -> list[str]:
        """Return the names of the layer calls of the last run that no issue names, in order of execution.

        Raises:
            NotAnalyzedError: if nothing was run yet.
        """
        return list(healthy_layers(self.record, issues))


class FlowAnalyzer(_LastRecord):
    """The low-level engine: measurements by layer name, no verdicts.

    Args:
        model: the model; it is left as it is.

    >>> import torch
    >>> from torch import nn
    >>> flow = FlowAnalyzer(nn.Sequential(nn.Linear(2, 3), nn.Tanh()))
    >>> layers = flow.analyze(lambda: torch.ones(4, 2), lambda y: y.sum(), steps=3)
    >>> layers["1"].grad_norm.tolist()  # the gradient of a sum is one everywhere: the root of 12
    [3.46..., 3.46..., 3.46...]
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def analyze(
        self,
        input_fn: Any,
        loss_fn: Callable[..., Any] | None,
        steps: int = 20,
        optimizer: Optimizer | None = None,
    ) -> Mapping[str, LayerRecord]:
        """Run the model and return the record of every layer call by name, in order of execution.

        Args:
            input_fn: a zero-argument function that returns the next batch, or an iterable of batches.
            loss_fn: from the model's output to a scalar; None takes the model's own loss.
            steps: how many batches to run at most.
            optimizer: steps copies of the parameters; None holds them fixed.
        """
        self._record = analyze(self.model, input_fn, loss_fn, steps=steps, optimizer=optimizer)
        return {layer.name: layer for layer in self._record}

    def analyze_custom(
        self,
        forward_fn: Callable[[Any, int], Any],
        loss_fn: Callable[..., Any] | None,
        steps: int = 20,
        optimizer: Optimizer | None = None,
    ) -> Mapping[str, LayerRecord]:
        """Run a forward pass of one's own and return the record of every layer call by name.

        Args:
            forward_fn: called with (model, step); what it returns is given to `loss_fn`. It must call the
                model that it is given, not one that it holds.
            loss_fn: from that to a scalar.
            steps: how many times to call it.
            optimizer: steps copies of the parameters; None holds them fixed.
        """
        self._record = analyze_custom(self.model, forward_fn, loss_fn, steps=steps, optimizer=optimizer)
        return {layer.name: layer for layer in self._record}
