"""Private names of PyTorch: used in three files alone, and there in the release that the tests run on."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

from gradflow.functional import torch_pipelining, torch_private, torch_sharded

PACKAGE = Path(__file__).parents[2] / "gradflow"
FILES = [
    PACKAGE / "functional" / f"{name}.py" for name in ("torch_private", "torch_sharded", "torch_pipelining")
]
DOCS = f"{torch_private.__doc__}\n{torch_sharded.__doc__}\n{torch_pipelining.__doc__}"
TABLE = [line.split("|")[1] for line in DOCS.splitlines() if line.startswith("| `")]
NAMES = [name for cell in TABLE for name in re.findall(r"`([\w.]+)`", cell) if not name.startswith(".")]

# Private names that are looked for in other files: the last part of each in the table, and any of torch's.
LAST = {name.rpartition(".")[2] for name in NAMES}


def private_uses(tree: ast.AST) -> list[str]:
    """Return private names of PyTorch in a file: `torch._x`, imports of them, and attributes of the table."""
    own = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            text = ast.unparse(node)
            mine = text.startswith(("self.", "cls.")) or node.attr in own
            if text.startswith("torch.") or (node.attr in LAST and not mine):
                found.append(f"line {node.lineno}: {text}")
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [f"line {node.lineno}: {name}" for name in names if name.startswith("_")]
        if isinstance(node, ast.Constant) and node.value in LAST:  # `getattr(node, "_input_metadata")`
            found.append(f"line {node.lineno}: {node.value!r}")
    return [use for use in found if "__future__" not in use]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_other_file_uses_a_private_name(path: Path) -> None:
    if path not in FILES:
        assert private_uses(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_uses_are_found() -> None:
    text = (
        "import torch\nfrom torch._functorch import x\nfrom torch.utils import _pytree\n"
        "torch._C.f()\ny._version\ngetattr(z, '_backward_hooks')\nself._version\ny._mine\n"
    )
    assert {use.partition(": ")[2] for use in private_uses(ast.parse(text))} == {
        "_functorch",
        "_pytree",
        "torch._C",
        "'_backward_hooks'",
        "y._version",
    }


SET = (
    "torch.utils.checkpoint",
    "Module._distribute_module_applied",
)  # which functions set; see tests/distributed
OWNERS = {
    "torch": torch,
    "Node": torch.autograd.graph.Node,
    "Tensor": torch.ones(1, requires_grad=True).square(),
    "Module": torch.nn.Linear(1, 1),
    "Function": type("Own", (torch.autograd.Function,), {}),
    "Optimizer": torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1),
    "UntypedStorage": torch.UntypedStorage,
    "DataLoader": torch.utils.data.DataLoader([1]),
    "_C": torch._C,
    "autograd": torch.autograd,
    "autograd.graph": torch.autograd.graph,
    "utils": torch.utils,
    "_functorch": importlib.import_module("torch._functorch"),
    "_BatchNorm": torch.nn.modules.batchnorm,
    "_NormBase": torch.nn.modules.batchnorm,
    "_InstanceNorm": torch.nn.modules.instancenorm,
    "distributed_c10d": torch.distributed.distributed_c10d,
    "FSDPModule": importlib.import_module("torch.distributed.fsdp").FSDPModule,
    "tensor._utils": importlib.import_module("torch.distributed.tensor._utils"),
    "DistributedDataParallel": torch.nn.parallel.DistributedDataParallel,
    "ProcessGroup": torch.distributed.ProcessGroup,
    **{
        name: getattr(importlib.import_module(f"torch.distributed.pipelining.{module}"), name)
        for module, name in (
            ("schedules", "PipelineScheduleSingle"),
            ("schedules", "PipelineScheduleMulti"),
            ("schedules", "_PipelineSchedule"),
            ("stage", "_PipelineStage"),
        )
    },
}
# attributes of instances, which need a process group
OF_INSTANCES = ("DistributedDataParallel", "PipelineSchedule", "PipelineStage")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SET])
def test_this_release_of_torch_has_the_name(name: str) -> None:
    owner, _, attribute = name.rpartition(".")
    if owner == "Node":  # nodes of C++ have the attribute, the abstract class does not
        assert hasattr(torch.ones(1, requires_grad=True).square().grad_fn, attribute)
    elif any(of in owner for of in OF_INSTANCES):
        assert f"self.{attribute}" in inspect.getsource(OWNERS[owner])
    else:
        assert hasattr(OWNERS[owner or name], attribute)
