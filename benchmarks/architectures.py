"""Runs `gradflow.diagnose` on every language model that `transformers` can build from a small configuration.

    python benchmarks/architectures.py [--only NAME ...] [--limit 120] [--write]

Every architecture that `transformers` offers as a causal, masked or sequence-to-sequence language model is
built from a tiny configuration (`tiny_models.py`), without a download, and diagnosed at its own
initialisation on random tokens with labels, the loss being the model's own. For each the script checks that

  - the norms of all parameter gradients of step 0 are those of a plain `loss.backward()` on a copy of the
    model under the same random state, to a relative `TOLERANCE` (a norm below `FLOOR` times the model's
    largest counts as that large: a gradient that should cancel is nothing but rounding),
  - parameters, buffers, `.grad`, `requires_grad`, modes, attributes and random states are what they were.

Each model runs in a process of its own with a time limit. `--write` writes the page `docs/architectures.md`.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import multiprocessing
import random
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
import transformers  # type: ignore[import-not-found]
from tiny_models import TASKS, batch_for, tiny_model
from torch import Tensor, nn

import gradflow as gf

ROOT = Path(__file__).resolve().parents[1]
SEED, STEPS = 0, 3
TOLERANCE, FLOOR = 1e-5, 1e-6
PASSED, GRADFLOW, PLAIN, BUILD = "passed", "gradflow fails", "the plain model fails", "cannot be built"


# Why there is an issue above LOW, looked into by hand. A figure belongs nowhere in here.
_POOLER = "True: a pooler runs for its classification head, and this loss does not use what it gives."
_INDEXER = "True: an indexer only chooses positions, by topk, and a choice has no gradient."
REASONS = {
    "bailing_hybrid": "True: the gate's bias is drawn below zero and scaled up to where the sigmoid is flat.",
    "big_bird": _POOLER,
    "cpmant": "True: its weights start with a deviation of one, so signal and gradient grow in every layer.",
    "deepseek_v4": _INDEXER + " Parts that compress longer sequences than this one are idle.",
    "encoder-decoder": _POOLER,
    "esm": "True: the contact head has a method of its own, and forward does not name it.",
    "fnet": _POOLER,
    "layoutlm": _POOLER,
    "luke": _POOLER,
    "mra": "True: without its CUDA kernel the attention gives zeros, whatever its projections are.",
    "nemo_speechlm": "True: the parts for time stamps have a method of their own, outside of forward.",
    "nllb-moe": "True: some experts got none of the few tokens, which are the same in every step.",
    "qwen4_exp": _INDEXER,
    "qwen4_exp_text": _INDEXER,
    "reformer": "True: the head has a bias beside that of its linear layer, and does not add it.",
    "squeezebert": _POOLER,
    "xlnet": "True: the embedding of masked tokens is used with a target mapping alone.",
}


@attrs.frozen
class Row:
    """What came of one architecture."""

    architecture: str
    task: str
    status: str
    reason: str = ""
    model: str = ""
    layers: int = 0
    parameters: int = 0
    seconds: float = 0.0
    error: float = 0.0  # the largest relative difference of a norm to plain backward
    issues: tuple[str, ...] = ()


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def plain_norms(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, float]:
    """Return the norm of every parameter's gradient by plain forward and backward; 0 where there is none."""
    seed_all(SEED)
    model(**batch).loss.backward()
    gradients = [(name, p.grad) for name, p in model.named_parameters()]
    return {n: g.double().norm().item() if g is not None else 0.0 for n, g in gradients}


def state_of(model: nn.Module) -> list[Any]:
    """Return all that a run has to leave as it was."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    held = [(n, id(t), t.detach().clone(), t.grad, t.requires_grad) for n, t in tensors]
    inner = [(n, m.training, {k: id(v) for k, v in vars(m).items()}) for n, m in model.named_modules()]
    return [held, inner, torch.get_rng_state(), np.random.get_state(), random.getstate()]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, (Tensor, np.ndarray)):
        return torch.equal(a, b) if isinstance(a, Tensor) else np.array_equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def examined(architecture: str, task: str) -> Row:
    """Build one model, run it plainly and under gradflow, and compare."""
    stage, name = BUILD, ""
    try:
        seed_all(SEED)
        model = tiny_model(architecture, task)
        name = type(model).__name__
        batch = batch_for(architecture, task)
        stage = PLAIN
        norms = plain_norms(copy.deepcopy(model), batch)
        stage = GRADFLOW
        before = state_of(model)
        start = time.perf_counter()
        report = gf.diagnose(model, lambda: batch, steps=STEPS, seed=SEED)
        seconds = time.perf_counter() - start
        if not same(before, state_of(model)):
            return Row(architecture, task, GRADFLOW, "the model is not what it was", name)
        error = largest_error(report.record, norms)
    except Exception as problem:
        where = traceback.extract_tb(problem.__traceback__)[-1]
        text = " ".join(str(problem).split())
        place = f"{Path(where.filename).name}:{where.lineno}"
        return Row(architecture, task, stage, f"{type(problem).__name__}: {text} ({place})", name)
    return Row(
        architecture,
        task,
        PASSED if error <= TOLERANCE else GRADFLOW,
        "" if error <= TOLERANCE else f"a gradient differs from plain backward by {error:.1e}",
        name,
        len(report.record),
        report.record.provenance.num_parameters,
        seconds,
        error,
        tuple(
            f"{issue.severity.value} {issue.issue_type.value} {issue.layer}"
            for issue in report.issues
            if issue.severity > gf.IssueSeverity.LOW
        ),
    )


def largest_error(record: gf.FlowRecord, norms: dict[str, float]) -> float:
    """Return the largest relative difference of a norm at step 0, none below the floor counting in full."""
    floor = FLOOR * max(norms.values())
    pairs = [(norms[p.name], p.grad_norm[0] if p.reached[0] else 0.0) for p in record.parameters]
    return max(abs(a - b) / max(a, b, floor) if a != b else 0.0 for a, b in pairs)


def guarded(architecture: str, task: str, limit: float) -> Row:
    """Examine one architecture in a process of its own, which ends with it."""
    context = multiprocessing.get_context("fork")  # what is imported is there at once
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(architecture, task, theirs))
    process.start()
    theirs.close()
    try:
        row = ours.recv() if ours.poll(limit) else None
        reason = f"took more than {limit:.0f} s"
    except EOFError:
        process.join()
        row, reason = None, f"its process ended with status {process.exitcode}"
    if row is None:
        process.kill()
    process.join()
    return row or Row(architecture, task, GRADFLOW, reason)


def _work(architecture: str, task: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    pipe.send(examined(architecture, task))


# ------------------------------------------------------------------------------------ the page


def page(rows: Sequence[Row]) -> str:
    """Return `docs/architectures.md`."""
    passed = [r for r in rows if r.status == PASSED]
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("torch", "transformers"))
    alarms = sum(bool(r.issues) for r in passed)
    parts = [
        "# Architectures of transformers",
        "Every architecture that `transformers` offers as a causal, masked or sequence-to-sequence language "
        "model is built from a tiny configuration, without a download, and diagnosed at its own "
        f"initialisation: {STEPS} steps on random tokens with labels, the loss being the model's own. A "
        "model *passes* if no error is raised, the norms of all parameter gradients of step 0 are those of "
        f"plain `loss.backward()` (to a relative {TOLERANCE:.0e}), and the model is afterwards what it was. "
        "All figures are from one run of",
        "```\npython benchmarks/architectures.py --write\n```",
        f"with {versions}. In all {len(rows)}: {len(passed)} pass, of {len({r.model for r in passed})} "
        f"model classes; {alarms} of these get an issue above LOW. The largest relative difference of a "
        f"gradient norm to plain backward is {max((r.error for r in passed), default=0.0):.1e}.",
    ]
    for status in (GRADFLOW, PLAIN, BUILD):
        some = [r for r in rows if r.status == status]
        parts += [f"## {status[0].upper()}{status[1:]}", _failures(some) if some else "None."]
    told = [r for r in passed if r.issues]
    parts += ["## Issues above LOW", _told_of(told) if told else "None."]
    return "\n\n".join([*parts, "## Passed", _passed(passed)]) + "\n"


def _failures(rows: Sequence[Row]) -> str:
    return _table(
        ["architecture", "as", "reason"], ([r.architecture, r.task, _short(r.reason)] for r in rows)
    )


def _told_of(rows: Sequence[Row]) -> str:
    return _table(
        ["architecture", "as", "issues", "reason"],
        (
            [
                r.architecture,
                r.task,
                _short("; ".join(r.issues)),
                REASONS.get(r.architecture, "not looked into yet"),
            ]
            for r in rows
        ),
    )


def _short(text: str, most: int = 240) -> str:
    return text if len(text) <= most else f"{text[:most]} ..."


def _passed(rows: Sequence[Row]) -> str:
    return _table(
        ["architecture", "as", "model", "layers", "parameters", "seconds"],
        (
            [r.architecture, r.task, f"`{r.model}`", str(r.layers), f"{r.parameters:,}", f"{r.seconds:.2f}"]
            for r in rows
        ),
    )  # fmt: skip


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _told(row: Row) -> str:
    head = f"{row.architecture:28} {row.task:8} {row.status:22}"
    if row.status != PASSED:
        return f"{head} {row.reason}"
    numbers = f"{row.layers:4} layers {row.parameters:10,} parameters {row.seconds:6.2f} s"
    return f"{head} {numbers} {row.error:.0e} {'; '.join(row.issues)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these architectures alone")
    parser.add_argument("--limit", type=float, default=120, help="seconds for one model (default: 120)")
    parser.add_argument("--write", action="store_true", help="write docs/architectures.md")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    examined("gpt2", "causal")  # what it loads is there for all processes
    rows = []
    for task, names in TASKS.items():
        for architecture in names:
            if options.only is None or architecture in options.only:
                rows.append(guarded(architecture, task, options.limit))
                print(_told(rows[-1]), flush=True)
    for status in (PASSED, GRADFLOW, PLAIN, BUILD):
        print(f"{sum(r.status == status for r in rows):4} {status}")
    print(f"{sum(bool(r.issues) for r in rows):4} with an issue above LOW")
    print(f"tolerance {TOLERANCE:.0e}, largest error {max((r.error for r in rows), default=0.0):.1e}")
    if options.write:
        (ROOT / "docs" / "architectures.md").write_text(page(rows))
    sys.exit(any(r.status == GRADFLOW for r in rows))


if __name__ == "__main__":
    main()
