"""Shows that a restructuring changed nothing: dumps what gradflow says of many models, and compares dumps.

    python benchmarks/same.py dump FILE [--cases FOLDER ...] [--only PART] [--gradflow PATH]
    python benchmarks/same.py compare OLD NEW [--only PART] [--rtol X] [--strict] [--verbose]

The models are those of the zoo (every case, sick, repaired or healthy, at its usual width, in float32), those
of `examples/`, and those of every folder of labelled cases: one whose `cases.py` has `CASES`. Each is
diagnosed over 20 steps in the ways of `ways`. A dump has of each the record, the issues, the causes and the
report's text, or the error; versions and folders are left out, so that two dumps of the same code are the
same bit for bit. It is JSON with a line for each run, compressed if the name ends in `.gz`.

`--gradflow` takes the package from another checkout. What is asked of it is its public face alone, so this
file runs against older ones:

    python benchmarks/same.py dump old.json.gz --gradflow ../before
    python benchmarks/same.py dump new.json.gz
    python benchmarks/same.py compare old.json.gz new.json.gz

Every value counts: numbers to the last bit (or to the relative difference that `--rtol` allows), the order of
issues, what only one dump has. Two things may change without a difference, and are listed apart, once each:
fields that only the new dump has, and metrics of issues that vanished or appeared, since they may have moved
to fields of their own. `--strict` counts these too. The exit status is 1 if there is a difference.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import importlib.util
import json
import logging
import math
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

ROOT = Path(__file__).resolve().parents[1]
STEPS, SHOWN, WIDTH = 20, 3, 100  # of a run; differences told of each; characters of a value told

# What names a model, or a class of module in it, for which a pipeline is made.
KINDS = {
    "transformer": r"transformer|attention",
    "recurrent": r"rnn|lstm|\bgru\b",
    "policy": r"\bzoo/rl-|policy|\bactor",
}

# A model, its batches, its loss and its optimizer, ready to be trained.
Program = tuple[nn.Module, Any, Callable[..., Any], Optimizer | None]
Builder = Callable[[], Program]
Dump = dict[str, dict[str, Any]]


# ------------------------------------------------------------------------------------------------- models


def zoo_models() -> Iterator[tuple[str, Builder]]:
    """Yield the name and the builder of every model of the zoo."""
    sys.path.insert(0, str(ROOT / "benchmarks" / "verdicts"))
    zoo = importlib.import_module("zoo")

    def builder(case: Any, sick: bool) -> Builder:
        def build() -> Program:
            setup = case.build(sick=sick)
            return setup.model, setup.make_batch, setup.loss_fn, setup.optimizer()

        return build

    for case in zoo.CASES.values():
        for name in ("healthy",) if case.healthy else ("sick", "repaired"):
            yield f"zoo/{case.id}/{name}", builder(case, name == "sick")


def example_models() -> Iterator[tuple[str, Builder]]:
    """Yield the name and the builder of every model of the examples."""
    sys.path.insert(0, str(ROOT / "examples"))

    def builder(function: Callable[[], tuple[Any, ...]]) -> Builder:
        def build() -> Program:
            model, batches, loss_fn, *optimizer = function()
            return model, batches, loss_fn, optimizer[0] if optimizer else None

        return build

    for file in sorted((ROOT / "examples").glob("*.py")):
        module = importlib.import_module(file.stem)
        for name, function in (("sick", "build"), ("repaired", "repaired")):
            if hasattr(module, function):
                yield f"examples/{file.stem}/{name}", builder(getattr(module, function))


def folder_models(folder: Path) -> Iterator[tuple[str, Builder]]:
    """Yield the name and the builder of every model of a folder of labelled cases."""
    name = folder.resolve().name
    spec = importlib.util.spec_from_file_location(f"cases_of_{name}", folder / "cases.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"{folder / 'cases.py'}: cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def builder(case: Any, fixed: bool) -> Builder:
        def build() -> Program:
            built = case.build(fixed=True) if fixed else case.build()
            return built.model, built.make_batch, built.loss_fn, built.optimizer()

        return build

    for case in module.CASES.values():
        yield f"{name}/{case.id}/{'healthy' if case.healthy else 'sick'}", builder(case, False)
        if case.has_fix:
            yield f"{name}/{case.id}/repaired", builder(case, True)


def models(folders: Sequence[Path], only: str) -> dict[str, Builder]:
    """Return the builders of the chosen models by name."""
    found: dict[str, Builder] = {}
    for some in (zoo_models(), example_models(), *map(folder_models, folders)):
        for name, builder in some:
            if name in found:
                raise SystemExit(f"{name} is there twice: rename one of the folders that are called alike")
            found[name] = builder
    return {name: builder for name, builder in found.items() if only in name}


# --------------------------------------------------------------------------------------------------- dump


def gradflow_of(checkout: Path) -> ModuleType:
    """Import gradflow from a checkout, even if another one is installed."""
    sys.path.insert(0, str(checkout.resolve()))
    gradflow = importlib.import_module("gradflow")
    if not Path(str(gradflow.__file__)).resolve().is_relative_to(checkout.resolve()):
        raise SystemExit(f"{checkout}: expected a checkout with gradflow in it, got {gradflow.__file__}")
    return gradflow


def ways(gf: Any, name: str, model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the arguments of each way to diagnose a model.

    The first is that of the scorers. All special pipelines in one measure every model, whatever it is; those
    that the model's name or its modules speak of run alone too, as they are used.
    """
    pipelines = gf.pipelines
    every = pipelines.policy(pipelines.recurrent(pipelines.transformer()))
    found = {"default": {}, "full": {"detail": "full", "seed": 0}, "every": {"pipeline": every, "seed": 0}}
    words = " ".join([name, *(type(module).__name__ for module in model.modules())]).lower()
    for kind, pattern in KINDS.items():
        if re.search(pattern, words):
            found[kind] = {"pipeline": getattr(pipelines, kind)(), "seed": 0}
    return found


def portable(text: str) -> str:
    """Return text without what differs between places and processes: folders of files, and addresses."""
    text = re.sub(r"(?<![\w.])(?:[A-Za-z]:)?(?:[\\/]+[^\\/\s\"'():,]+)+[\\/]+([\w.-]+\.py)\b", r"\1", text)
    return re.sub(r"\b0x[0-9a-f]{6,}", "0x", text)


def failure(problem: Exception) -> dict[str, Any]:
    """Return what is dumped of a model that raises."""
    return {"error": portable(f"{type(problem).__name__}: {problem}".splitlines()[0])}


def answer(gf: Any, build: Builder, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what one diagnosis of a fresh model says, as plain data: NaN and infinities as strings."""
    torch.manual_seed(0)
    try:
        model, batches, loss_fn, optimizer = build()
        report = gf.diagnose(model, batches, loss_fn, steps=STEPS, optimizer=optimizer, **arguments)
    except Exception as problem:
        return failure(problem)
    told = json.loads(portable(report.to_json()))
    told["record"].pop("format", None)
    told["record"]["provenance"].pop("versions", None)
    return {part: told[part] for part in ("record", "issues", "causes")} | {
        "text": portable(report.text("full"))
    }


def answers(gf: Any, name: str, build: Builder) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the key and the answer of every way to diagnose a model."""
    try:
        model = build()[0]
    except Exception as problem:
        yield f"{name}/build", failure(problem)
        return
    for way, arguments in ways(gf, name, model).items():
        yield f"{name}/{way}", answer(gf, build, arguments)


def write(file: Path, runs: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Write runs as they come, a line each, and yield them; neither name nor time enters the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as raw:
        out = gzip.GzipFile("", "wb", 6, raw, mtime=0) if file.suffix == ".gz" else raw
        out.write(b"{")
        for number, (key, run) in enumerate(runs):
            line = f"{json.dumps(key)}: {json.dumps(run, allow_nan=False)}"
            out.write(f"{',' if number else ''}\n{line}".encode())
            yield run
        out.write(b"\n}\n")
        out.close()


def dump(args: argparse.Namespace) -> int:
    """Diagnose the chosen models and write what is said of them."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # what has no such algorithm is no error
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    start, gf = time.perf_counter(), gradflow_of(args.gradflow)
    chosen = models(args.cases, args.only)
    if not chosen:
        raise SystemExit(f"there is no model with {args.only!r} in its name")
    runs = (run for name, build in chosen.items() for run in answers(gf, name, build))
    raised = ["error" in run for run in write(args.file, runs)]
    seconds = time.perf_counter() - start
    print(f"{len(chosen)} models, {len(raised)} runs, {sum(raised)} of them raised: {seconds:.0f} s")
    return 0


# ------------------------------------------------------------------------------------------------ compare


class Missing:
    """Stands for what one of two dumps does not have."""

    def __repr__(self) -> str:
        return "nothing"


MISSING = Missing()


@dataclass(frozen=True)
class Difference:
    """A place where two runs differ: a value that is not the same, a field that is new, one that moved."""

    kind: Literal["value", "new", "moved"]
    path: str
    old: Any
    new: Any

    @property
    def field(self) -> str:
        """The path without positions in lists, and which way what moved did."""
        path = re.sub(r"\[\d+\]", "[]", self.path)
        return path if self.kind != "moved" else f"{path} {'appeared' if self.old is MISSING else 'vanished'}"

    def __str__(self) -> str:
        text = f"{self.path}: {shown(self.old)} -> {shown(self.new)}"
        if not (isinstance(self.old, float) and isinstance(self.new, float)):
            return text
        return f"{text} (relative {self.relative:.1e})"

    @property
    def relative(self) -> float:
        """Of two numbers, the difference over the larger one; infinite for anything else."""
        if not (isinstance(self.old, float) and isinstance(self.new, float)):
            return math.inf
        largest = max(abs(self.old), abs(self.new))
        return abs(self.old - self.new) / largest if largest else 0.0


def shown(value: Any) -> str:
    """Return a value in one line that is not too long."""
    text = repr(value)
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."


def run_differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[Difference]:
    """Yield where two runs differ; of those of which one raised alone, that it did."""
    for part in ("error",) if "error" in {**old, **new} else tuple(old):
        yield from differences(old.get(part, MISSING), new.get(part, MISSING), part)


def differences(old: Any, new: Any, path: str) -> Iterator[Difference]:
    """Yield where two pieces of plain data differ, in the order of the old one."""
    if isinstance(old, dict) and isinstance(new, dict):
        moves = bool(re.search(r"(^|\.)issues\[\d+\]\.metrics$", path))
        for name in dict.fromkeys([*old, *new]):
            at, pair = f"{path}.{name}", (old.get(name, MISSING), new.get(name, MISSING))
            if MISSING not in pair:
                yield from differences(*pair, at)
            else:
                yield Difference("moved" if moves else "new" if name in new else "value", at, *pair)
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            yield Difference("value", f"{path}.length", len(old), len(new))
        for i, pair in enumerate(zip(old, new, strict=False)):
            yield from differences(*pair, f"{path}[{i}]")
    elif isinstance(old, str) and isinstance(new, str):
        if old != new and "\n" in old + new:
            yield from differences(old.split("\n"), new.split("\n"), path)
        elif old != new:
            yield Difference("value", path, old, new)
    elif type(old) is not type(new) or repr(old) != repr(new):  # 0.0 and -0.0 are two
        yield Difference("value", path, old, new)


def read(file: Path, only: str) -> Dump:
    """Return the chosen runs of a dump."""
    data = file.read_bytes()
    runs = json.loads(gzip.decompress(data) if file.suffix == ".gz" else data)
    return {key: run for key, run in runs.items() if only in key}


def print_fields(title: str, fields: Counter[str]) -> None:
    """Print how often each field was met."""
    if fields:
        print(title)
    for field, count in sorted(fields.items()):
        print(f"  {count:6} × {field}")


def compare(args: argparse.Namespace) -> int:
    """Print where two dumps differ, and return whether they do."""
    old, new = (read(file, args.only) for file in (args.old, args.new))
    keys, differ = list(dict.fromkeys([*old, *new])), 0
    if not keys:
        raise SystemExit(f"there are no runs to compare with {args.only!r} in their names")
    fields: dict[str, Counter[str]] = {"new": Counter(), "moved": Counter()}
    for key in keys:
        if key not in old or key not in new:
            print(f"{key}: only in the {'old' if key in old else 'new'} dump")
            differ += 1
            continue
        told = []
        for difference in run_differences(old[key], new[key]):
            if difference.kind == "value" or args.strict:
                told += [difference] if difference.relative > args.rtol else []
            else:
                fields[difference.kind][difference.field] += 1
        if told:
            print(f"{key}: {len(told)} differ")
            some = told if args.verbose else told[:SHOWN]
            print(*(f"  {difference}" for difference in some), sep="\n")
        differ += bool(told)
    print_fields("new fields", fields["new"])
    print_fields("moved fields", fields["moved"])
    count = f"{len({key.rpartition('/')[0] for key in keys})} models, {len(keys)} runs"
    print(f"{count}: {f'{differ} runs differ' if differ else 'no difference'}")
    return int(differ > 0)


def main() -> int:
    """Dump or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("dump", help="diagnose the models, and write what is said of them").add_argument
    add("file", type=Path, metavar="FILE")
    add("--cases", type=Path, action="append", default=[], metavar="FOLDER", help="further labelled cases")
    add("--only", default="", metavar="PART", help="a part of the names of the models to run")
    add("--gradflow", type=Path, default=ROOT, metavar="PATH", help="the checkout to take gradflow from")
    commands.choices["dump"].set_defaults(run=dump)
    add = commands.add_parser("compare", help="tell where two dumps differ").add_argument
    add("old", type=Path, metavar="OLD")
    add("new", type=Path, metavar="NEW")
    add("--only", default="", metavar="PART", help="a part of the names of the runs to compare")
    add("--rtol", type=float, default=-1.0, metavar="X", help="relative difference that two numbers may have")
    add("--strict", action="store_true", help="new fields and moved ones are differences")
    add("--verbose", action="store_true", help="every difference, not only the first of each run")
    commands.choices["compare"].set_defaults(run=compare)
    args = parser.parse_args()
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
