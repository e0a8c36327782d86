"""The class interface, as people know it from other tools: thin shells over the functions, without logic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from gradflow.diagnosis import diagnose, diagnose_custom
from gradflow.errors import NotAnalyzedError, check_one_source
from gradflow.functional.analyze import Optimizers, analyze, analyze_custom
from gradflow.pipelines import Pipeline, automatic, flow, policy, recurrent, transformer
from gradflow.records import FlowRecord, Issue, LayerRecord, ReservoirDynamics
from gradflow.report import Report, attention_text, dynamics_text, healthy_layers, policy_text, summary_text
from gradflow.results import PolicyResults, RecurrentResults, TransformerResults


def _say(text: str) -> None:
    print(text)  # noqa: T201 - printing is what `print_summary` is for


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


class _Diagnosing(_LastRecord):
    """Runs `diagnose` with a pipeline of its own.

    Args:
        model: the model; it is left as it is.
        pipeline: what is measured and judged.
    """

    def __init__(self, model: nn.Module, pipeline: Pipeline) -> None:
        self.model, self.pipeline = model, pipeline

    def _diagnosed(
        self,
        input_fn: Any,
        loss_fn: Callable[..., Any] | None,
        steps: int,
        optimizer: Optimizers | None,
        loop: Mapping[str, Any],
        forward_fn: Callable[[Any, int], Any] | None = None,
    ) -> Report:
        how: Any = {"steps": steps, "optimizer": optimizer, "pipeline": self.pipeline, **loop}
        if forward_fn is not None:
            report = diagnose_custom(self.model, forward_fn, loss_fn, **how)
        else:
            report = diagnose(self.model, input_fn, loss_fn, **how)
        self._record = report.record
        return report


class GradientFlowAnalyzer(_Diagnosing):
    """Finds what is wrong with a model's gradient flow.

    Args:
        model: the model; it is left as it is.
        name: how to call it; the class name of the model by default.
        enable_rnn_analyzer: measure gradient, state and gates through time in recurrent layers as fully as
            `gradflow.pipelines.recurrent` does; otherwise as `gradflow.automatic` does.
        enable_circular_flow_analyser: also measure the flow along every edge of the layer graph, for
            divergence, circulation and curl; slower.
        vanishing_threshold: see `gradflow.vanishing`.
        exploding_threshold: see `gradflow.exploding`.
        dead_threshold: see `gradflow.dead`.
        unstable_cv_threshold: see `gradflow.unstable`.

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
        self.name = name or type(model).__name__
        self.enable_rnn_analyzer = enable_rnn_analyzer
        base = flow(
            vanishing_threshold=vanishing_threshold,
            exploding_threshold=exploding_threshold,
            dead_threshold=dead_threshold,
            unstable_cv_threshold=unstable_cv_threshold,
            detail="full" if enable_circular_flow_analyser else "cheap",
        )
        super().__init__(model, automatic(recurrent(base) if enable_rnn_analyzer else base))

    def analyze(
        self,
        input_fn: Any,
        loss_fn: Callable[..., Any] | None,
        steps: int = 20,
        optimizer: Optimizers | None = None,
        **loop: Any,
    ) -> list[Issue]:
        """Run the model and return the issues, most severe first. The arguments are those of `diagnose`.

        Args:
            input_fn: a zero-argument function that returns the next batch, or an iterable of batches.
            loss_fn: from the model's output to a scalar; None takes the model's own loss.
            steps: how many batches to run at most.
            optimizer: steps copies of the parameters; None holds them fixed.
            **loop: clip, accumulate, scheduler, scaler, step_fn, as for `diagnose`.
        """
        return list(self._diagnosed(input_fn, loss_fn, steps, optimizer, loop).issues)

    def print_summary(self, issues: Sequence[Issue]) -> None:
        """Print how many issues there are of each severity, then each of them."""
        _say(summary_text(issues))

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
        optimizer: Optimizers | None = None,
        **loop: Any,
    ) -> Mapping[str, LayerRecord]:
        """Run the model and return the record of every layer call by name, in order of execution.

        Args:
            input_fn: a zero-argument function that returns the next batch, or an iterable of batches.
            loss_fn: from the model's output to a scalar; None takes the model's own loss.
            steps: how many batches to run at most.
            optimizer: steps copies of the parameters; None holds them fixed.
            **loop: clip, accumulate, scheduler, scaler, step_fn, as for `diagnose`.
        """
        self._record = analyze(self.model, input_fn, loss_fn, steps=steps, optimizer=optimizer, **loop)
        return {layer.name: layer for layer in self._record}

    def analyze_custom(
        self,
        forward_fn: Callable[[Any, int], Any],
        loss_fn: Callable[..., Any] | None,
        steps: int = 20,
        optimizer: Optimizers | None = None,
        **loop: Any,
    ) -> Mapping[str, LayerRecord]:
        """Run a forward pass of one's own and return the record of every layer call by name.

        Args:
            forward_fn: called with (model, step); what it returns is given to `loss_fn`. It must call the
                model that it is given, not one that it holds.
            loss_fn: from that to a scalar.
            steps: how many times to call it.
            optimizer: steps copies of the parameters; None holds them fixed.
            **loop: clip, accumulate, scheduler, scaler, step_fn, as for `diagnose`.
        """
        self._record = analyze_custom(
            self.model, forward_fn, loss_fn, steps=steps, optimizer=optimizer, **loop
        )
        return {layer.name: layer for layer in self._record}


class TransformerAnalyzer(_Diagnosing):
    """Finds what is wrong with the attention and the gradient flow of a transformer.

    Args:
        model: any model with attention; it is left as it is.

    >>> import torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> analyzer = TransformerAnalyzer(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True))
    >>> loss_fn = lambda y: y[..., 0].square().mean()
    >>> results = analyzer.analyze(lambda: torch.randn(8, 6, 16), loss_fn, steps=3)
    >>> analyzer.print_summary(results)
    [OK] No gradient issues found.
    <BLANKLINE>
    attention  entropy  share  largest  heads differ  residual in    out  branch
    self_attn    1.699  0.948    0.280         0.188        0.908  0.389       -
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, transformer())

    def analyze(
        self,
        input_fn: Any,
        loss_fn: Callable[..., Any] | None,
        steps: int = 20,
        optimizer: Optimizers | None = None,
        **loop: Any,
    ) -> TransformerResults:
        """Run the model and return what its attention is like, and what is wrong.

        Args:
            input_fn: a zero-argument function that returns the next batch, or an iterable of batches.
            loss_fn: from the model's output to a scalar; None takes the model's own loss.
            steps: how many batches to run at most.
            optimizer: steps copies of the parameters; None holds them fixed.
            **loop: clip, accumulate, scheduler, scaler, step_fn, as for `diagnose`.
        """
        report = self._diagnosed(input_fn, loss_fn, steps, optimizer, loop)
        return TransformerResults(
            attention_stats=report.record.transformer.stats,
            gradient_issues=report.issues,
            report=report,
        )

    def print_summary(self, results: TransformerResults) -> None:
        """Print the issues, then a line for each attention layer."""
        _say(f"{summary_text(results.gradient_issues)}\n\n{attention_text(results.attention_stats)}")


class RLPolicyAnalyzer(_Diagnosing):
    """Finds what is wrong with a policy: its action distribution, and the gradients through policy and value.

    Args:
        model: an actor-critic or any model that gives a distribution of actions; it is left as it is.
        policy_head_name: qualified name of the module that gives the policy, or several; found if None.
        value_head_name: of the module that gives the value, or several; found if None.
        shared_backbone_name: of the module whose parameters both share, or several; found if None.

    >>> import torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> analyzer = RLPolicyAnalyzer(nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2)))
    >>> states, gains = torch.randn(32, 4), torch.randn(32)
    >>> loss = lambda y: -(y.log_softmax(-1)[:, 0] * gains).mean()
    >>> results = analyzer.analyze(lambda: states, loss, steps=3)
    >>> 0.6 < results.policy_distribution_stats.mean_entropy < 0.7
    True
    >>> analyzer.print_summary(results)  # doctest: +ELLIPSIS
    [OK] No gradient issues found.
    <BLANKLINE>
    Policy:
      entropy                     0.6... nats
    ...
    """

    def __init__(
        self,
        model: nn.Module,
        policy_head_name: str | Sequence[str] | None = None,
        value_head_name: str | Sequence[str] | None = None,
        shared_backbone_name: str | Sequence[str] | None = None,
    ) -> None:
        named = policy(
            policy_head_name=policy_head_name,
            value_head_name=value_head_name,
            shared_backbone_name=shared_backbone_name,
        )
        super().__init__(model, named)

    def analyze(
        self,
        input_fn: Any = None,
        loss_fn: Callable[..., Any] | None = None,
        steps: int = 20,
        optimizer: Optimizers | None = None,
        forward_fn: Callable[[Any, int], Any] | None = None,
        **loop: Any,
    ) -> PolicyResults:
        """Run the model and return what its policy is like, and what is wrong.

        Args:
            input_fn: a zero-argument function that returns the next batch, or an iterable of batches.
            loss_fn: from the model's output to a scalar; None takes the model's own loss.
            steps: how many batches to run at most.
            optimizer: steps copies of the parameters; None holds them fixed.
            **loop: clip, accumulate, scheduler, scaler, step_fn, as for `diagnose`.
            forward_fn: instead of `input_fn`, for what is not `model(batch)`: called with (model, step), it
                returns what `loss_fn` takes, `model.evaluate_actions(observations, actions)` for instance.

        Raises:
            UnknownLayerError: if the model has no module of a name that was given.
            ModelInputError: if neither or both of `input_fn` and `forward_fn` are given.
        """
        check_one_source(input_fn, forward_fn)
        report = self._diagnosed(input_fn, loss_fn, steps, optimizer, loop, forward_fn)
        assert report.record.policy is not None
        return PolicyResults(
            policy_distribution_stats=report.record.policy.statistics(),
            gradient_issues=report.issues,
            report=report,
        )

    def print_summary(self, results: PolicyResults) -> None:
        """Print the issues, then the policy in numbers."""
        _say(f"{summary_text(results.gradient_issues)}\n\n{policy_text(results.policy_distribution_stats)}")


class RecurrentAnalyzer(_Diagnosing):
    """Finds what is wrong with gradient and state of a recurrent network over time.

    Args:
        model: any model with recurrent layers, or with loops over recurrent cells; it is left as it is.
        enable_rnn_analyzer: measure and judge what happens through time; False runs the pipeline `flow` alone
            and leaves `reservoir_dynamics` without numbers.
        track_hidden_states: also measure the rms of h, and of c, at every step, for
            `results.report.record.recurrences`; the dynamics and the issues do not depend on it.

    >>> import torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> analyzer = RecurrentAnalyzer(nn.GRU(4, 16))
    >>> results = analyzer.analyze(lambda: torch.randn(20, 8, 4), lambda y: y[0].square().mean(), steps=3)
    >>> results.reservoir_dynamics.gradient_profile.shape
    (20,)
    >>> analyzer.print_summary(results)
    [OK] No gradient issues found.
    <BLANKLINE>
    recurrent    radius  lyapunov     steps    memory    recall      lost
    (model)       0.6...    -0.5...        20        20         9    -0.3...
    """

    def __init__(
        self, model: nn.Module, enable_rnn_analyzer: bool = True, track_hidden_states: bool = True
    ) -> None:
        with_time = recurrent(track_hidden_states=track_hidden_states)
        super().__init__(model, with_time if enable_rnn_analyzer else flow())

    def analyze(
        self,
        input_fn: Any,
        loss_fn: Callable[..., Any] | None,
        steps: int = 20,
        optimizer: Optimizers | None = None,
        **loop: Any,
    ) -> RecurrentResults:
        """Run the model and return what its recurrent layers do over time, and what is wrong.

        Args:
            input_fn: a zero-argument function that returns the next batch, or an iterable of batches.
            loss_fn: from the model's output to a scalar; None takes the model's own loss.
            steps: how many batches to run at most.
            optimizer: steps copies of the parameters; None holds them fixed.
            **loop: clip, accumulate, scheduler, scaler, step_fn, as for `diagnose`.
        """
        report = self._diagnosed(input_fn, loss_fn, steps, optimizer, loop)
        return RecurrentResults(
            reservoir_dynamics=ReservoirDynamics.of(report.record.recurrences),
            gradient_issues=report.issues,
            report=report,
        )

    def print_summary(self, results: RecurrentResults) -> None:
        """Print the issues, then a line for each level of each recurrent layer."""
        _say(f"{summary_text(results.gradient_issues)}\n\n{dynamics_text(results.reservoir_dynamics)}")
