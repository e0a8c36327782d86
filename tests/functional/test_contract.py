"""The purity contract, of every public function that runs code of the user's.

Model and loss draw every kind of random number, hold dropout and batch norm, write to buffers and attributes,
change modes, and change the process's states; the loss is a module, a function that holds modules, or one
that finds them among its globals. A public name that is in none of the two lists here fails the first test.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import gradflow as gf
from gradflow import functional
from tests.functional.snapshots import content, difference, process, snapshot

# Names whose code runs none of the user's: records, judgements on records, numbers of tensors, names.
WITHOUT = {
    *("Cause", "FlowRecord", "GradflowError", "GradientIssue", "GradientScale", "Issue", "IssueSeverity"),
    *("IssueType", "OnRank", "Report", "__version__", "action_entropy", "all_of", "bottleneck", "dead"),
    *("detect",),
    *("default_detectors", "exploding", "find_causes", "gradient_scale", "numerical", "only", "remap"),
    *("saturation", "unstable", "vanishing", "without", "ActionStatistics", "Cell", "Gain", "GradientNoise"),
    *("HeadGradients", "HeadStatistics", "LayerFunction", "LayerNoise", "Level", "Spectrum", "VectorField"),
    *("action_statistics", "attention_entropy", "attention_statistics", "effective_rank", "head_distances"),
    *("layers", "lyapunov_exponents", "position_residual", "probe", "spectral_radii", "state_jacobians"),
    *("AttentionStats", "Evidence", "OwnIssueType", "Pipeline", "PolicyDistributionStats", "issue_type"),
    *("ReservoirDynamics", "Role", "Rule", "register_record", "unroll"),
    *("ReachAccount", "ReachRecord", "Reason", "automatic", "flow"),
    *("Comparison", "EventRecord", "HistoryRecord", "Observer", "ObserverState", "compare", "read_history"),
    *("Remedy", "TrialRecord", "TrialVerdict", "TrialsRecord"),
    "outline",  # of models without values: tests/functional/test_outline.py
    "try_remedies",  # runs copies of what is diagnosed; held to the contract in tests/remedies
    *("Measurement", "Session", "gradients"),  # parts of a run, which itself is held to the contract
    *(
        "UpdateFigures",
        "curvature_along",
        "remembered",
        "update_figures",
    ),  # of tensors and optimizers, without a model
}


class Failure(Exception):
    """What the user's code raises."""


class Script:
    """When the user's code raises: at its call number `at`, counted over model and loss."""

    at, calls = 0, 0


def disturb(shape: torch.Size) -> Tensor:
    """Draw from everything; raise where the script says so."""
    Script.calls += 1
    if Script.calls == Script.at:
        raise Failure("on the way")
    return (0.1 * torch.rand(shape) + 0.1 * np.random.rand() + 0.1 * random.random()).float()


class Net(nn.Module):
    """A model that moves all it can."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.drop = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)
        self.head, self.twin = nn.Linear(4, 2), nn.Linear(4, 2)
        self.register_buffer("count", torch.zeros(2))
        self.calls, self.kept, self.table = 0, [], {"last": None}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        self.last = self.drop(self.norm(self.inner(x)))
        self.kept.append(self.last)
        self.table["last"] = self.last.detach()
        h = self.attention(self.last[None], self.last[None], self.last[None])[0][0]
        y = self.head(h + disturb(h.shape)) + self.twin(h)
        self.drop.eval()
        self.norm.momentum = 0.3
        return y


class Loss(nn.Module):
    """A loss with layers of its own, which leaves the process in another state."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.norm, self.drop, self.weight = nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, width)
        self.register_buffer("count", torch.zeros(2))
        self.calls = 0

    def forward(self, y: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        flat = y.reshape(-1, y.shape[-1])
        h = self.drop(self.norm(self.weight(flat))) + disturb(flat.shape)
        self.drop.eval()
        loss = (h * flat).square().mean() + flat.square().mean()
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        return loss


class Holder:
    """An object that is called and keeps its module to itself."""

    def __init__(self, loss: Loss) -> None:
        self.parts = {"loss": [loss]}

    def __call__(self, y: Tensor) -> Tensor:
        return self.parts["loss"][0](y)


HELD_BY_NAME = Loss()


def by_name(y: Tensor) -> Tensor:
    """A loss that finds its module among its globals."""
    return HELD_BY_NAME(y)


def losses() -> dict[str, tuple[Any, Loss]]:
    """Return a loss of every kind, and the module in it."""
    module, closed, held = Loss(), Loss(), Loss()
    return {
        "module": (module, module),
        "closure": (lambda y: closed(y), closed),
        "object": (Holder(held), held),
        "global": (by_name, HELD_BY_NAME),
    }


X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
SEQUENCE = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))


def rnn() -> nn.Module:
    """A recurrent layer whose weights are computed by iterations that move buffers."""
    return parametrizations.spectral_norm(nn.GRU(3, 4, num_layers=2, dropout=0.5), "weight_hh_l0")


def cell() -> nn.Module:
    return parametrizations.spectral_norm(nn.GRUCell(3, 4), "weight_hh")


def evaluated(module: nn.Module) -> nn.Module:
    """Return a module with its batch norm in evaluation, as gradients of single samples need it."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.eval()
    return module


def by_sample(function: Any) -> Callable[..., Any]:
    def run(model: Any, loss: Any, module: Any) -> Any:
        return function(model, X, loss, method="loop")

    return run


def heads(model: Any, loss: Any, module: Any) -> Any:
    with torch.inference_mode(False), torch.enable_grad():
        leaf = torch.ones(4, 3, requires_grad=True)
        h = leaf * 2.0
        h.register_hook(lambda g: g * (1 + disturb(g.shape)))  # the user's code in a backward pass
        policy, value = h.square(), h.exp()
        total = policy.sum() + value.sum()
    return gf.head_gradients(total, [policy], [value], {"leaf": leaf})


def of_jacobian(model: Any, loss: Any, module: Any) -> Any:
    jacobian = functional.Jacobian(lambda x: model(x) + loss(x @ torch.ones(3, 2)), X)
    return jacobian.jvp(X), jacobian.gain(num_probes=2), jacobian.singular_values(2)


def of_function(model: Any, loss: Any, module: Any) -> Any:
    function = gf.layer_function(model, "inner", X)
    return function(X), function.jacobian().gain(num_probes=2)


def game(model: Any, loss: Any) -> Any:
    return {"a": (lambda m: loss(m(X)), "inner"), "b": (lambda m: loss(-m(X)), ["head", "twin"])}


Run = Callable[[Any, Any, Any], Any]
MODEL: dict[str, Run] = {  # (model, loss, the module in the loss) → anything
    "analyze": lambda m, f, _: gf.analyze(m, [X] * 2, f, steps=2),
    "analyze_custom": lambda m, f, _: gf.analyze_custom(m, lambda m, step: m(X), f, steps=2),
    "diagnose": lambda m, f, _: gf.diagnose(m, [X] * 2, f, steps=2),
    "diagnose_custom": lambda m, f, _: gf.diagnose_custom(m, lambda m, step: m(X), f, steps=2),
    "layer_graph": lambda m, f, _: gf.layer_graph(m, X, f),
    "graph_of": lambda m, f, _: functional.graph_of(m, X, f),
    "GradientFlowAnalyzer": lambda m, f, _: gf.GradientFlowAnalyzer(m).analyze([X] * 2, f, steps=2),
    "FlowAnalyzer": lambda m, f, _: gf.FlowAnalyzer(m).analyze([X] * 2, f, steps=2),
    "TransformerAnalyzer": lambda m, f, _: gf.TransformerAnalyzer(m).analyze([X] * 2, f, steps=2),
    "RLPolicyAnalyzer": lambda m, f, _: gf.RLPolicyAnalyzer(m).analyze([X] * 2, f, steps=2),
    "RecurrentAnalyzer": lambda m, f, _: gf.RecurrentAnalyzer(m).analyze([X] * 2, f, steps=2),
    "attention": lambda m, f, _: gf.analyze(m, [X], f, measurements=[functional.attention()]),
    "policy_heads": lambda m, f, _: gf.analyze(m, [X], f, measurements=[functional.policy_heads()]),
    "recurrence": lambda m, f, _: gf.analyze(m, [X], f, measurements=[functional.recurrence()]),
    "precision": lambda m, f, _: gf.analyze(m, [X], f, measurements=[functional.precision()]),
    "curvature": lambda m, f, _: gf.analyze(
        m, [X] * 2, f, optimizer=torch.optim.SGD(m.parameters(), 0.1), measurements=[functional.curvature()]
    ),
    "Monitor": lambda m, f, _: gf.Monitor(m, f)(X),
    "observer": lambda m, f, _: gf.observer().update(gf.observer().init(), m, X, f)[1],
    "sample_losses": lambda m, f, _: gf.sample_losses(m, X, f),
    "attention_weights": lambda m, f, _: gf.attention_weights(m, X),
    "call": lambda m, f, _: functional.call(m, dict(m.named_parameters()), {}, (X,)),
    "layer_function": of_function,
    "layer_gain": lambda m, f, _: gf.layer_gain(m, "", X, num_probes=2),
    "layer_jvp": lambda m, f, _: gf.layer_jvp(m, "drop", X),
    "layer_vjp": lambda m, f, _: gf.layer_vjp(m, "", X),
    "layer_spectrum": lambda m, f, _: gf.layer_spectrum(m, "attention", X),
    "jacobian_between": lambda m, f, _: gf.jacobian_between(m, "inner", "", X).singular_values(2),
    "Jacobian": of_jacobian,
    "vector_field": lambda m, f, _: gf.vector_field(m, game(m, f), num_probes=2, max_exact=0),
    "field_jacobian": lambda m, f, _: gf.field_jacobian(m, f, X).gain(num_probes=2),
    "per_sample_gradients": by_sample(gf.per_sample_gradients),
    "gradient_noise": by_sample(gf.gradient_noise),
    "head_gradients": heads,
    "hidden_gradients": lambda m, f, _: gf.hidden_gradients(m, SEQUENCE, lambda r: f(r[0])),
    "levels_of": lambda m, f, _: functional.levels_of(m),
    "level_of_cell": lambda m, f, _: functional.level_of_cell(m),
}
OTHER_MODELS = {"hidden_gradients": rnn, "levels_of": rnn, "level_of_cell": cell}
RUNS_NOTHING = {"levels_of", "level_of_cell"}  # but the parametrisation of weights, which never raises here
OF_RUNS = {"analyze", "analyze_custom", "diagnose", "diagnose_custom", "layer_graph", "graph_of", "attention"}
OF_RUNS |= {"policy_heads", "precision", "recurrence", "curvature", "Monitor", "observer"}
OF_RUNS |= {name for name in MODEL if name.endswith("Analyzer")}


def test_every_public_name_is_in_one_list() -> None:
    public = {*gf.__all__, *functional.__all__}
    assert not WITHOUT & set(MODEL)
    assert public == WITHOUT | set(MODEL)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    Script.at = Script.calls = 0
    state = process()
    yield
    torch.set_default_dtype(state["dtype"])
    torch.set_grad_enabled(True)


def built(name: str, kind: str) -> tuple[Any, Any, Any]:
    """Return the model, the loss and the module in it, each with gradients of its own."""
    torch.manual_seed(1)
    model, (loss, module) = OTHER_MODELS.get(name, Net)(), losses()[kind]
    if name == "hidden_gradients":
        module.norm, module.weight = nn.BatchNorm1d(4), nn.Linear(4, 4)
    elif kind == "global":
        module.norm, module.weight = nn.BatchNorm1d(2), nn.Linear(2, 2)
    if name in ("per_sample_gradients", "gradient_noise"):
        evaluated(model), evaluated(module)
    for p in (*model.parameters(), *module.parameters()):
        p.grad = torch.ones_like(p)
    next(model.parameters()).requires_grad_(False)
    np.random.seed(1)
    random.seed(1)
    return model, loss, module


def kinds_of(name: str) -> list[str]:
    """Return the kinds of losses that a function is tried with: a run holds the state of modules alone."""
    return ["module"] if name in OF_RUNS else ["module", "closure", "object", "global"]


def numbers(value: Any) -> Any:
    """Return what a result says, without the identities in it."""
    if isinstance(value, Tensor):
        return value.detach().clone().numpy().tobytes()
    if isinstance(value, (tuple, list)):
        return [numbers(item) for item in value]
    if isinstance(value, dict):
        return {key: numbers(item) for key, item in value.items()}
    return repr(value) if hasattr(type(value), "__attrs_attrs__") else None


CASES = [(name, kind) for name in MODEL for kind in kinds_of(name)]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_everything_is_left_as_it_was(name: str, kind: str, mode: Any) -> None:
    model, loss, module = built(name, kind)
    with mode():
        before = snapshot(model), content(module), [b._version for b in module.buffers()]
        first = MODEL[name](model, loss, module)
        assert Script.calls > 0 or name in ("levels_of", "level_of_cell")
        after = snapshot(model), content(module), [b._version for b in module.buffers()]
        assert difference(list(before), list(after)) == ""
        again = numbers(MODEL[name](model, loss, module))
    assert again == numbers(first)


@pytest.mark.parametrize("at", [1, 2, 3, 5])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_everything_is_left_as_it_was_when_it_raises(name: str, kind: str, at: int) -> None:
    model, loss, module = built(name, kind)
    MODEL[name](model, loss, module)
    if Script.calls < at or name in RUNS_NOTHING:
        return  # the code is not called that often
    Script.at, Script.calls = at, 0
    before = snapshot(model), content(module)
    try:
        MODEL[name](model, loss, module)
    except Failure:
        assert Script.calls == at
    after = snapshot(model), content(module)
    assert difference(list(before), list(after)) == ""
    assert Script.calls >= at
