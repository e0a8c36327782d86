"""Models cut into stages of a pipeline: how each is cut, what an analysis shows, whether all is as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.nn.parallel import DistributedDataParallel

import gradflow as gf
from tests.distributed.models import GPT, MODELS, Case, ResNet, part
from tests.distributed.sharded import held


def whole(name: str) -> Case:
    """Return a model, batches and a loss; a ResNet with batch norms of its own, not joined over processes."""
    case, _, kind = name.partition("-")
    if case != "resnet":
        return MODELS[case](kind or "healthy")
    model, batches, loss_fn = MODELS[case]("plain")
    if kind == "sick":
        nn.init.zeros_(model.blocks[0].conv1.weight)  # type: ignore[union-attr,index,arg-type]
    return model, batches, loss_fn


class Cut(nn.Module):
    """A stage: some of a model's parts, under the names that they have in it."""

    def __init__(self, model: nn.Module, index: int, number: int) -> None:
        super().__init__()
        self.is_first, self.is_last = index == 0, index == number - 1
        inner = "blocks" if isinstance(model, ResNet) else "layers"
        for name, child in model.named_children():
            if name == inner:
                blocks = list(child.named_children())
                own = range(index * len(blocks) // number, (index + 1) * len(blocks) // number)
                kept = nn.Sequential()
                for i in own:
                    kept.add_module(*blocks[i])
                self.add_module(name, kept)
            elif (name in ("stem", "word", "place") or (inner == "blocks" and name == "norm")) == (
                self.is_first
            ) and (self.is_first or self.is_last):
                self.add_module(name, child)


class CutResNet(Cut):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x))) if self.is_first else x
        x = self.blocks(x)
        return self.head(x.mean((2, 3))) if self.is_last else x


class CutGPT(Cut):
    def forward(self, x: Tensor) -> Tensor:
        x = self.word(x) + self.place(torch.arange(x.shape[1])) if self.is_first else x
        x = self.layers(x)
        return self.head(self.norm(x)) if self.is_last else x


def cut(model: nn.Module, index: int, number: int) -> nn.Module:
    """Return a stage of a model."""
    if isinstance(model, ResNet):
        return CutResNet(model, index, number)
    if isinstance(model, GPT):
        return CutGPT(model, index, number)
    kept, every = nn.Sequential(), list(model.named_children())
    for name, child in every[index * len(every) // number : (index + 1) * len(every) // number]:
        kept.add_module(name, child)
    return kept


def measured(name: str, how: str, rank: int, size: int, *, moves: bool, **options: Any) -> dict[str, Any]:
    """Return what a pipeline shows, and whether all of this process's stage is as it was before."""
    model, batches, loss_fn = whole(name)
    index, number, mine, group = rank, size, batches, None
    if how != "alone":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("pp", "dp"))
        index, number, group = mesh["pp"].get_local_rank(), 2, mesh["pp"].get_group()
        mine = part(batches, mesh["dp"].get_local_rank(), size // 2)
        module = cut(model, index, number)
        if how == "replicated":
            module = DistributedDataParallel(module, process_group=mesh["dp"].get_group())
        else:
            for inner in reversed(list(module.modules())):
                if isinstance(inner, (nn.Linear, nn.Embedding)):
                    fully_shard(inner, mesh=mesh["dp"])
            fully_shard(module, mesh=mesh["dp"])
    else:
        module = cut(model, index, number)
    stage = PipelineStage(module, index, number, torch.device("cpu"), group=group)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2) if moves else None
    before = held(module, optimizer)
    report = gf.diagnose(
        stage, mine, loss_fn, steps=len(mine), optimizer=optimizer, seed=0, **options
    )  # fmt: skip
    after = held(module, optimizer)
    changed = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
    return {
        "record": report.record,
        "verdicts": [
            (i.layer.replace("module.", ""), i.issue_type.value, i.severity.value) for i in report.issues
        ],
        "changed": changed,
    }


# (how, model): (whether an optimizer moves the parameters, options)
ON_TWO: dict[tuple[str, str], tuple[bool, dict[str, Any]]] = {
    ("alone", "mlp"): (False, {"detail": "full"}),
    ("alone", "mlp-sick"): (True, {}),
    ("alone", "resnet"): (True, {"detail": "full"}),
    ("alone", "resnet-sick"): (False, {}),
    ("alone", "gpt"): (False, {"detail": "full"}),
    ("alone", "gpt-sick"): (True, {}),
    ("alone", "mixture"): (True, {}),
    ("alone", "mixture-sick"): (False, {}),
}
ON_FOUR: dict[tuple[str, str], tuple[bool, dict[str, Any]]] = {
    ("replicated", "mlp"): (True, {}),
    ("replicated", "gpt-sick"): (False, {"detail": "full"}),
    ("gathered", "mlp-sick"): (True, {}),
    ("gathered", "gpt"): (False, {}),
    ("alone", "mlp-sick"): (False, {}),
}


def _scenario(how: str, name: str, moves: bool, options: dict[str, Any]) -> Callable[[int, int], Any]:
    return lambda rank, size: measured(name, how, rank, size, moves=moves, **options)


for (_how, _name), (_moves, _options) in {**ON_FOUR, **ON_TWO}.items():
    globals()[f"{_how} {_name}"] = _scenario(_how, _name, _moves, _options)
