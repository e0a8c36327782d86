"""Models spread over processes: how each is spread, what an analysis shows, whether all is as it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import gradflow as gf
from gradflow.errors import ModelInputError
from tests.distributed.models import MODELS, Case, next_word, words


class Heads(nn.Module):
    """A transformer layer whose projections can be split by heads."""

    def __init__(self, width: int = 8, heads: int = 4) -> None:
        super().__init__()
        self.norm1, self.norm2, self.heads = nn.LayerNorm(width), nn.LayerNorm(width), width // heads
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: Tensor) -> Tensor:
        h, (n, t, _) = self.norm1(x), x.shape
        q, k, v = (
            f(h).view(n, t, -1, self.heads).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + self.out(mixed.reshape(n, t, -1))
        return x + self.down(F.relu(self.up(self.norm2(x))))


def heads(kind: str) -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), Heads(), Heads(), nn.Linear(8, 11)).double()
    if kind == "sick":
        nn.init.constant_(model[1].up.bias, -60.0)  # type: ignore[union-attr,arg-type]
    return model, words(), next_word


def born(kind: str) -> Case:
    """A NaN that a function makes of one sample alone, which one process has."""
    model, batches, loss_fn = MODELS["mlp"]("healthy")

    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x.abs() > 40.0, (-x.abs()).log(), x)

    model[1] = nn.Sequential(nn.ReLU(), Log())  # type: ignore[index,operator]
    batches[1][0][-1] *= 1000.0
    return model, batches, loss_fn


CASES: dict[str, Callable[[str], Case]] = {**MODELS, "heads": heads, "born": born}


# --------------------------------------------------------------------------------------- spread


def gathered(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Have `fully_shard` spread a model's parameters, part by part."""
    large = (nn.Linear, nn.Embedding, nn.Conv2d, Heads)
    for module in reversed(list(model.modules())):  # the inner ones first
        experts = isinstance(module, nn.Sequential) and any(isinstance(m, nn.GELU) for m in module)
        if (isinstance(module, large) or experts) and module is not model:
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)  # type: ignore[return-value]


def split(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Split pairs of layers by their units, the attention by its heads, and the last layer by its classes."""
    plan: dict[str, Any] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, Heads):
            plan |= {prefix + n: ColwiseParallel() for n in ("query", "key", "value", "up")}
            plan |= {prefix + n: RowwiseParallel() for n in ("out", "down")}
        elif isinstance(module, nn.Sequential) and isinstance(module[0], nn.Linear):
            linear = [i for i, layer in enumerate(module) if isinstance(layer, nn.Linear)]
            for a, b in zip(linear[::2], linear[1::2], strict=False):
                plan |= {f"{prefix}{a}": ColwiseParallel(), f"{prefix}{b}": RowwiseParallel()}
    if hasattr(model, "head"):
        plan["head"] = ColwiseParallel(output_layouts=Replicate())
    return parallelize_module(model, mesh, plan)


def spread(model: nn.Module, how: str, rank: int, size: int) -> tuple[nn.Module, int, int]:
    """Spread a model; return it, the part of the batch that this process has, and how many there are."""
    if how == "tensor":
        return split(model, init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))), 0, 1
    if how == "both":
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
        return gathered(split(model, mesh["tp"]), mesh["dp"]), rank // 2, size // 2
    sides = (2, size // 2) if how == "replicated" else (size,)
    return (
        gathered(model, init_device_mesh("cpu", sides, mesh_dim_names=("a", "b")[: len(sides)])),
        rank,
        size,
    )


# ------------------------------------------------------------------------------------- measured


def held(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Return all that a process holds of a model and its optimizer."""

    def bits(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return repr(value)
        here = value.to_local() if isinstance(value, DTensor) else value
        return type(value).__name__, here.dtype, tuple(here.shape), here.detach().clone().numpy().tobytes()

    found: dict[str, Any] = {}
    for name, p in model.named_parameters():
        found[name] = id(p), p.requires_grad, bits(p), id(p.grad), bits(p.grad)
    for name, buffer in model.named_buffers():
        found[name] = bits(buffer)
    for name, module in model.named_modules():
        found[f"module {name}"] = type(module), module.training, sorted(vars(module))
        found[f"calls {name}"] = type(module).__call__, type(module).forward
        if isinstance(module, FSDPModule):
            found[f"groups {name}"] = list(_groups(module))
    if optimizer is not None:
        found["optimizer"] = [sorted((k, bits(v)) for k, v in s.items()) for s in optimizer.state.values()]
    return found | {"random": bits(torch.get_rng_state())}


def _groups(module: Any) -> Iterator[tuple[Any, ...]]:
    for group in module._get_fsdp_state()._fsdp_param_groups:
        yield (
            group._sharded_state, group._training_state, group.reduce_grads, group.all_reduce_grads,
            group.reshard_after_backward, group._reshard_after_forward, group.mp_policy,
            group._all_reduce_hook, [type(p.unsharded_accumulated_grad) for p in group.fsdp_params],
        )  # fmt: skip


def measured(name: str, how: str, rank: int, size: int, *, moves: bool, **options: Any) -> dict[str, Any]:
    """Return what a spread model shows, and whether all of it is as it was before."""
    model, batches, loss_fn = CASES[name.partition("-")[0]](name.partition("-")[2] or "healthy")
    model, mine, number = spread(model, how, rank, size)
    parts = [(x.chunk(number)[mine], y.chunk(number)[mine]) for x, y in batches]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2) if moves else None
    loss_fn(model(parts[0][0]), parts[0][1]).backward()  # gradients that must not be lost
    before = held(model, optimizer)
    report = gf.diagnose(model, parts, loss_fn, steps=len(parts), optimizer=optimizer, seed=0, **options)
    verdicts = [(i.layer, i.issue_type.value, i.severity.value) for i in report.issues]
    after = held(model, optimizer)
    changed = [key for key in before if before[key] != after[key]]
    return {"record": report.record, "verdicts": verdicts, "changed": changed}


def refused(rank: int, size: int) -> dict[str, str]:
    """Return what is said to calls that do not take such a model."""
    model, batches, loss_fn = MODELS["mlp"]("healthy")
    mesh = init_device_mesh("cpu", (size,))
    model = gathered(model, mesh)
    said = {}
    for name, call in {
        "alone": lambda: gf.analyze(model, batches, loss_fn, processes="alone"),
        "vjp": lambda: gf.analyze(model, batches, loss_fn, transform="vjp"),
        "loss": lambda: gf.analyze(model, batches, gathered(nn.Sequential(nn.Linear(3, 1)), mesh)),
        "jacobian": lambda: gf.layer_gain(model, "0", batches[0][0]),
    }.items():
        try:
            call()
        except ModelInputError as error:
            said[name] = str(error)
    return said


def viewed(rank: int, size: int) -> list[tuple[Any, ...]]:
    """Return why a unit gets no gradient that is off in a part whose input is first seen in another shape."""

    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.relu(x.view(-1, 2, 3)).flatten(1))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), Folded())
    nn.init.constant_(model[0].bias[2:3], -50.0)  # type: ignore[index,arg-type]
    mesh = init_device_mesh("cpu", (size,))
    for module in (*model, model):
        fully_shard(module, mesh=mesh)
    record = gf.analyze(model, [(torch.randn(8, 4), torch.randn(8, 1))], nn.MSELoss(), steps=1)
    assert record.reach is not None
    return [(part.parameter, part.reason, part.op, part.slices) for part in record.reach.unreached]


def _accumulated(model: nn.Module) -> list[Any]:
    """Return the gradients that an unfinished accumulation has not handed out yet."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups: list[Any] = [group for part in parts for group in part._get_fsdp_state()._fsdp_param_groups]
    return [held._unsharded_param.grad for group in groups for held in group.fsdp_params]


def penalised(rank: int, size: int) -> dict[str, Any]:
    """Return what is measured and changed where the loss holds the model."""

    class Penalised(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(output, target)

    model, batches, loss_fn = MODELS["mlp"]("healthy")
    model = gathered(model, init_device_mesh("cpu", (size,)))
    model.set_requires_gradient_sync(False)  # type: ignore[operator]
    parts = [(x.chunk(size)[rank], y.chunk(size)[rank]) for x, y in batches]
    loss_fn(model(parts[0][0]), parts[0][1]).backward()  # what it accumulates must not be lost
    waiting = _accumulated(model)
    plain, held_by_loss = (gf.analyze(model, parts, loss, steps=2) for loss in (loss_fn, Penalised(model)))
    after = _accumulated(model)
    same = [p.grad_norm.tolist() for p in plain.parameters] == [
        p.grad_norm.tolist() for p in held_by_loss.parameters
    ]
    kept = [a is b for a, b in zip(waiting, after, strict=True)]
    return {"same": same, "kept": all(kept) and any(w is not None for w in waiting)}


def raises(rank: int, size: int) -> Any:
    """A layer raises on one process, in the middle of a pass in which the others gather.

    An exchange that was broken off leaves a group of gloo's unusable, so it is the last of the scenarios.
    """
    model, batches, loss_fn = MODELS["mlp"]("healthy")

    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if rank == 1 and x.abs().max() > 1e6:
                raise ValueError("too large for me")
            return x

    model[1] = nn.Sequential(nn.ReLU(), Picky())  # type: ignore[index,operator]
    model = gathered(model, init_device_mesh("cpu", (size,)))
    parts = [(x.chunk(size)[rank], y.chunk(size)[rank]) for x, y in batches]
    loss_fn(model(parts[0][0]), parts[0][1]).backward()
    before = held(model, None)
    began = time.monotonic()
    try:
        gf.analyze(model, [(x * 1e9, y) for x, y in parts], loss_fn, steps=2)
        said = ""
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    after = held(model, None)
    changed = [key for key in before if before[key] != after[key]]
    return {"said": said, "changed": changed, "seconds": time.monotonic() - began}


# name: (model and its kind, whether an optimizer moves the parameters, options)
ON_TWO: dict[tuple[str, str], tuple[bool, dict[str, Any]]] = {
    ("sharded", "mlp"): (False, {"detail": "full"}),
    ("sharded", "mlp-sick"): (True, {}),
    ("sharded", "resnet"): (True, {}),
    ("sharded", "resnet-sick"): (False, {}),
    ("sharded", "gpt"): (False, {"detail": "full"}),
    ("sharded", "gpt-sick"): (True, {}),
    ("sharded", "mixture"): (True, {}),
    ("sharded", "mixture-sick"): (False, {}),
    ("sharded", "born"): (True, {}),
    ("tensor", "mlp"): (True, {}),
    ("tensor", "mlp-sick"): (False, {}),
    ("tensor", "resnet"): (False, {}),
    ("tensor", "heads"): (True, {}),
    ("tensor", "heads-sick"): (False, {}),
    ("tensor", "mixture"): (False, {}),
    ("tensor", "born"): (False, {}),
}
ON_FOUR: dict[tuple[str, str], tuple[bool, dict[str, Any]]] = {
    ("replicated", "mlp"): (True, {}),
    ("replicated", "gpt-sick"): (True, {}),
    ("both", "mlp-sick"): (True, {}),
    ("both", "resnet"): (False, {}),
    ("both", "heads"): (True, {}),
    ("both", "heads-sick"): (False, {}),
    ("both", "mixture"): (False, {}),
}


def _scenario(how: str, name: str, moves: bool, options: dict[str, Any]) -> Callable[[int, int], Any]:
    return lambda rank, size: measured(name, how, rank, size, moves=moves, **options)


for (_how, _name), (_moves, _options) in {**ON_TWO, **ON_FOUR}.items():
    globals()[f"{_how} {_name}"] = _scenario(_how, _name, _moves, _options)
