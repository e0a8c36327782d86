"""What is refused: one sentence that says what came, and how to put it right. The model stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn

import gradflow as gf
from gradflow.errors import ModelInputError, ModelNotCalledError
from gradflow.functional import layer_gain
from tests.models import squares


def batch() -> Tensor:
    return torch.randn(5, 4)


def refused(model: Any, match: str, **options: Any) -> None:
    """Check that every way in refuses a model, in one way, before a step is run."""
    for way in (gf.analyze, gf.diagnose, gf.layer_graph):
        with pytest.raises(ModelInputError, match=match) as caught:
            way(model, batch() if way is gf.layer_graph else [batch()] * 2, squares, **options)
        assert str(caught.value).endswith((".", "`", ")"))


# ------------------------------------------------------------------------------------ without values

LAZY: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.LazyLinear(2)),
    "convolution": lambda: nn.Sequential(nn.LazyConv2d(3, 3), nn.Flatten(), nn.Linear(3, 2)),
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 3), nn.LazyBatchNorm1d()),
    "batch norm without parameters": lambda: nn.Sequential(nn.Linear(4, 3), nn.LazyBatchNorm1d(affine=False)),
}


@pytest.mark.parametrize("name", LAZY)
def test_lazy_modules(name: str) -> None:
    refused(LAZY[name](), r"lazy module that has not seen a batch yet.*`model\(x\)`")


def test_a_lazy_module_is_taken_once_it_has_seen_a_batch() -> None:
    model = LAZY["linear"]()
    model(batch())
    assert gf.analyze(model, [batch()], squares).steps == 1


META: dict[str, Callable[[], nn.Module]] = {
    "all": lambda: nn.Linear(4, 2, device="meta"),
    "one layer": lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2, device="meta")),
    "a buffer": lambda: nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2, affine=False, device="meta")),
}


@pytest.mark.parametrize("name", META)
def test_the_meta_device(name: str) -> None:
    refused(META[name](), "is on the meta device and has no values.*to_empty")


# ---------------------------------------------------------------------------------- quantised, sharded


def quantised(kind: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)).eval()
    if kind == "dynamic":
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    if kind == "dynamic LSTM":
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(4, 4)), {nn.LSTM})
    model = nn.Sequential(nn.Linear(4, 2))
    model.register_buffer("table", torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8))
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["dynamic", "dynamic LSTM", "a buffer"])
def test_quantised(kind: str) -> None:
    match = "quantised layers carry no gradient.*before it was quantised"
    refused(quantised(kind), match)
    with pytest.raises(ModelInputError, match=match):
        layer_gain(quantised(kind), "0", batch())


@pytest.mark.usefixtures("group")
def test_fully_sharded() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    with pytest.raises(
        ModelInputError, match="is a DTensor: its values are sharded.*`diagnose` take such models"
    ):
        layer_gain(model, "0", batch())
    assert gf.analyze(model, [batch()], lambda y: y.square().mean()).steps == 1  # one process holds it all


@pytest.mark.usefixtures("group")
def test_sharded_by_a_wrapper() -> None:
    class FullyShardedDataParallel(nn.Module):  # the real one wants an accelerator
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    refused(FullyShardedDataParallel(nn.Linear(4, 2)), "FullyShardedDataParallel: its values are sharded")


def test_data_parallel_over_several_devices() -> None:
    model = nn.DataParallel(nn.Linear(4, 2))
    model.device_ids = [0, 1]
    refused(model, r"is a DataParallel over 2 devices.*`model.module`")


# --------------------------------------------------------------------------------------- not a model


@pytest.mark.parametrize("thing", [nn.Linear, torch.sin, None, {"a": nn.Linear(4, 2)}, [nn.Linear(4, 2)]])
def test_what_is_no_model(thing: Any) -> None:
    refused(thing, r"not a torch.nn.Module.*`MyModel\(\)`")


def test_layers_that_are_in_no_module() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.scale = [nn.Linear(4, 2)], nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x)

    record = gf.analyze(Hidden(), [batch()], squares)
    assert record.reach is not None
    assert record.reach.num_reached == 0
    assert [tensor.name for tensor in record.reach.outside] == ["layers[0].weight", "layers[0].bias"]


def test_another_model_than_the_one_that_is_called() -> None:
    model, other = nn.Linear(4, 2), nn.Linear(4, 2)
    with pytest.raises(ModelNotCalledError, match="must call this very model"):
        gf.analyze_custom(model, lambda m, step: other(batch()), squares)
