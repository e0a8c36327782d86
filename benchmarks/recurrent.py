"""What the recurrent pipeline costs, where the time of a look goes, and its numbers beside exact ones.

    python benchmarks/recurrent.py [--steps 20] [--only NAME ...] [--no-models] [--write]

Processor time of one thread. gradflow draws a batch before each of its steps; at that moment a plain step
(forward pass, loss and backward pass) is timed on a copy of the model, so that every step has a plain one
next to it. A *run* is all that `diagnose` takes, over as many plain steps; a *look* is a step in which the
recurrent layers are measured, over the plain step next to it: the last one of the run.
The ten models are measured by default and with `exact=True`, which looks at more moments and samples, to more
digits; the reverse pass of each is also timed with subnormal numbers as they are and flushed to zero.
`--write` puts the tables into docs/performance.md.
"""

from __future__ import annotations

import argparse
import copy
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from overhead import markdown
from torch import Tensor, nn
from workloads import Workload

import gradflow as gf
from gradflow.functional import levels_of, recurrence, unroll
from gradflow.functional.recurrent import fused, measurement, numbers
from gradflow.functional.recurrent.numbers import last_of, profile
from gradflow.functional.recurrent.unroll import TrackGradients, track_gradients
from gradflow.functional.reverse.flushing import flushing
from gradflow.records import RecurrenceRecord

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


class Reader(nn.Module):
    """A recurrent layer of which the last step, or every one, is classified."""

    def __init__(self, rnn: nn.RNNBase, *, every: bool) -> None:
        super().__init__()
        width = (rnn.proj_size or rnn.hidden_size) * (2 if rnn.bidirectional else 1)
        self.rnn, self.head, self.every = rnn, nn.Linear(width, 10), every

    def forward(self, x: Tensor) -> Tensor:
        y = self.rnn(x)[0]
        return self.head(y if self.every else y[:, -1])


def cross_entropy(y: Tensor) -> Tensor:
    rows = y.reshape(-1, 10)
    return nn.functional.cross_entropy(rows, torch.arange(len(rows)) % 10)


Make = Callable[..., nn.RNNBase]
# kind of layer, inputs, hidden, further options, samples, steps, whether every step is read
WORKLOADS: dict[str, tuple[Make, int, int, dict[str, Any], int, int, bool]] = {
    "LSTM 3 x 512, 32 x 256, last step read": (nn.LSTM, 256, 512, {"num_layers": 3}, 32, 256, False),
    "LSTM 3 x 256, 16 x 128, last step read": (nn.LSTM, 256, 256, {"num_layers": 3}, 16, 128, False),
    "LSTM 2 x 256, 16 x 64, every step read": (nn.LSTM, 64, 256, {"num_layers": 2}, 16, 64, True),
    "GRU 2 x 64, 16 x 50, last step read": (nn.GRU, 16, 64, {"num_layers": 2}, 16, 50, False),
    "LSTM 2 x 32, 16 x 28, last step read": (nn.LSTM, 4, 32, {"num_layers": 2}, 16, 28, False),
}
MODELS: dict[str, tuple[Make, int, int, dict[str, Any], int, int, bool]] = {
    "RNN tanh 64": (nn.RNN, 8, 64, {}, 24, 64, False),
    "RNN relu 64": (nn.RNN, 8, 64, {"nonlinearity": "relu"}, 24, 64, False),
    "RNN tanh 2 x 128": (nn.RNN, 8, 128, {"num_layers": 2}, 24, 100, True),
    "LSTM 2 x 32": (nn.LSTM, 8, 32, {"num_layers": 2}, 24, 50, True),
    "LSTM 128": (nn.LSTM, 8, 128, {}, 24, 200, False),
    "LSTM 2 x 256": (nn.LSTM, 64, 256, {"num_layers": 2}, 24, 64, True),
    "LSTM 48, both ways": (nn.LSTM, 8, 48, {"bidirectional": True}, 24, 40, False),
    "LSTM 64, projected to 24": (nn.LSTM, 8, 64, {"proj_size": 24}, 24, 64, False),
    "GRU 2 x 64": (nn.GRU, 8, 64, {"num_layers": 2}, 24, 50, True),
    "GRU 300": (nn.GRU, 16, 300, {}, 24, 64, False),
}


def build(spec: tuple[Make, int, int, dict[str, Any], int, int, bool]) -> Workload:
    """Return a model and a batch, the same every time."""
    torch.manual_seed(0)
    make, entering, hidden, options, samples, steps, every = spec
    model = Reader(make(entering, hidden, batch_first=True, **options), every=every)
    return Workload(model, torch.randn(samples, steps, entering), cross_entropy)


# ------------------------------------------------------------------------------------------------- cost


def cost(work: Workload, pipeline: Any, steps: int) -> tuple[float, float, float]:
    """Return run and look over the plain steps next to them, and the plain step in seconds."""
    twin = Workload(copy.deepcopy(work.model), work.batch, work.loss_fn)
    plain: list[float] = []
    marks: list[float] = []
    ends: list[float] = []

    def draw() -> Any:
        start = time.process_time()
        twin.plain_step()
        marks.append(time.process_time())
        plain.append(marks[-1] - start)
        return work.batch

    start = time.process_time()
    gf.diagnose(
        work.model,
        draw,
        work.loss_fn,
        steps=steps,
        pipeline=pipeline,
        progress=lambda *_: ends.append(time.process_time()),
    )
    total = time.process_time() - start
    step = statistics.median(plain)
    return (total - sum(plain)) / sum(plain), (ends[-1] - marks[-1]) / plain[-1], step


def cost_row(name: str, steps: int) -> list[str]:
    work = build(WORKLOADS[name])
    work.plain_step()
    run, look, step = cost(work, gf.pipelines.recurrent(), steps)
    return [name, f"{step * 1e3:.1f}", f"{run:.2f}", f"{look:.2f}"]


# ------------------------------------------------------------------------------------- parts of a look


PARTS: dict[str, tuple[Any, str]] = {
    "gradients at the layer's output": (measurement, "gradients"),
    "states, forward": (fused, "courses"),
    "gradients, back": (fused, "sent_back"),
    "spectral radii": (numbers, "_radii"),
    "Lyapunov exponents": (numbers, "_exponents"),
    "gates": (numbers, "_gates"),
    "all of it": (measurement.RecurrenceSession, "end"),
}


@contextmanager
def clocked(spent: dict[str, float]) -> Iterator[None]:
    """Add to `spent` how long the parts of a look take, for the length of the context."""

    def clock(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] = spent.get(part, 0.0) + time.process_time() - start

        return timed

    with ExitStack() as stack:
        for part, (owner, name) in PARTS.items():
            stack.enter_context(mock.patch.object(owner, name, clock(part, getattr(owner, name))))
        yield


def parts_row(name: str, rounds: int = 1) -> list[str]:
    """Return the parts of a look over the plain step; of the states and gradients, by autograd as well."""
    work = build(WORKLOADS[name])
    rows: list[dict[str, float]] = []
    for _ in range(rounds):
        spent: dict[str, float] = {}
        start = time.process_time()
        work.plain_step()
        plain = time.process_time() - start
        with clocked(spent):
            gf.analyze(work.model, [work.batch], work.loss_fn, steps=1, measurements=[recurrence()])
        spent |= by_autograd(work)[0]
        rows.append({part: seconds / plain for part, seconds in spent.items()})
    found = {part: statistics.median(row[part] for row in rows) for part in rows[0]}
    return [name, *(f"{found[part]:.2f}" for part in (*PARTS, *_AUTOGRAD))]


_AUTOGRAD = ("states by autograd", "gradients by autograd")


def by_autograd(work: Workload) -> tuple[dict[str, float], list[TrackGradients]]:
    """Return how long states, and gradients at them, take by the unrolled cells and autograd, and these."""
    model = work.model
    assert isinstance(model, Reader)
    samples = min(len(work.batch), numbers.Budget().numbers // _numbers(model.rnn, work.batch.shape[1]))
    x = work.batch[:samples].transpose(0, 1).contiguous().requires_grad_()
    start = time.process_time()
    unrolled = unroll(levels_of(model.rnn), x)
    middle = time.process_time()
    output = unrolled.output.detach().transpose(0, 1).requires_grad_()
    loss = work.loss_fn(model.head(output if model.every else output[:, -1]))
    (at,) = torch.autograd.grad(loss, output)
    found = track_gradients(unrolled, at.transpose(0, 1))
    times: dict[str, float] = dict(
        zip(_AUTOGRAD, (middle - start, time.process_time() - middle), strict=True)
    )
    return times, list(found)


def _numbers(rnn: nn.RNNBase, steps: int) -> int:
    return steps * sum(level.weight_ih.shape[0] for level in levels_of(rnn))


# ------------------------------------------------------------------------------------------- ten models


def measured(work: Workload, *, exact: bool) -> tuple[RecurrenceRecord, float]:
    """Return what is measured of one step, and the processor time that it took beside the plain analysis."""
    start = time.process_time()
    gf.analyze(work.model, [work.batch], work.loss_fn, steps=1, seed=0)
    middle = time.process_time()
    record = gf.analyze(
        work.model, [work.batch], work.loss_fn, steps=1, seed=0, measurements=[recurrence(exact=exact)]
    )
    return record.recurrences[0], time.process_time() - middle - (middle - start)


def model_row(name: str) -> tuple[list[str], list[tuple[float, float]]]:
    """Return how the numbers of a model by default lie to the exact ones: the level that differs most."""
    work = build(MODELS[name])
    new, seconds = measured(work, exact=False)
    old, exact_seconds = measured(work, exact=True)
    profiles, pairs = [], []
    for a, b, gradients in zip(new.levels, old.levels, by_autograd(work)[1], strict=True):
        norms = gradients.norms.numpy()
        p, q = a.gradient_profile[0], profile(norms, last_of(norms != 0), norms.shape[1])
        profiles.append(float(np.max(np.abs(p - q) / np.maximum(q, 1e-30 * q.max()))))
        pairs.append((_distance(a, b, "spectral"), _distance(a, b, "lyapunov")))
    first, last = new.levels[0], old.levels[0]
    texts = [
        name,
        f"{max(profiles):.0e}",
        f"{first.spectral_radius[0]:.3f} ± {first.spectral_error[0]:.3f}",
        f"{last.spectral_radius[0]:.3f} ± {last.spectral_error[0]:.3f}",
        f"{first.lyapunov[0]:.3f} ± {first.lyapunov_error[0]:.3f}",
        f"{last.lyapunov[0]:.3f} ± {last.lyapunov_error[0]:.3f}",
        f"{new.cost[0]:.2f}",
        f"{exact_seconds / seconds:.1f}",
    ]
    return texts, pairs


def _distance(new: Any, old: Any, kind: str) -> float:
    """Return how far apart two means are, in standard errors of their difference, residuals added."""
    name = "spectral_radius" if kind == "spectral" else "lyapunov"
    gap = abs(float(getattr(new, name)[0] - getattr(old, name)[0]))
    if kind == "spectral":
        gap = max(gap - float(new.spectral_residual[0] * new.spectral_radius[0]), 0.0)
    return gap / float(np.hypot(getattr(new, f"{kind}_error")[0], getattr(old, f"{kind}_error")[0]))


SLOW = ("RNN tanh 64", "LSTM 128", "LSTM 3 x 256, 16 x 128, last step read")
_HEADS = ("profiles", "radius", "exact radius", "exponent", "exact exponent", "cost", "exact")


def slow_row(name: str, rounds: int = 3) -> list[str]:
    """Return the share of subnormal steps, and the reverse pass as it is over that with them flushed."""
    work = build({**WORKLOADS, **MODELS}[name])
    share = float(measured(work, exact=False)[0].subnormal_share[0])
    ratios = []
    for _ in range(rounds):
        seconds = []
        for flush in (False, True):
            loss = work.loss()
            with ExitStack() as stack:
                if flush:
                    stack.enter_context(flushing())
                start = time.process_time()
                loss.backward()
                seconds.append(time.process_time() - start)
        ratios.append(seconds[0] / seconds[1])
    return [name, f"{share:.3f}", f"{statistics.median(ratios):.2f}"]


# ---------------------------------------------------------------------------------------------- the page


_TEXT = """## Recurrent layers

The recurrent pipeline on {steps} steps, of which it measures the first and the last: `python
benchmarks/recurrent.py --write`, processor time of one thread, PyTorch {version}. *Run* is all that
`diagnose` takes, over as many plain steps; *look* the last step, over the plain one next to it.

{costs}

Where a look goes, over the plain step; and what the states and the gradients of the same samples take by
`gradflow.functional.unroll` and autograd.

{parts}
"""

_MODELS = """By default and with `recurrent(exact=True)`, ten models at PyTorch's initialisation: the largest
relative difference of the gradient profile from that of the unrolled cells by autograd; of the lowest level,
spectral radius and Lyapunov exponent with their standard errors. *Cost* is `RecurrenceRecord.cost`, what
measuring takes in products with the layer's weights over those of its own step; *exact* how many times as
long the exact look takes. Of {number} radii and {number} exponents of all levels, {inside} lie within three
standard errors of the exact ones.

{models}

The reverse pass of the model itself with subnormal numbers as they are, over the same with them flushed to
zero (`torch.set_flush_denormal(True)`), and the share of its steps over which the gradient is subnormal. How
slow such numbers are depends on the processor: the table is of `{processor}`. On others each may take up to a
hundred times as long.

{slow}
"""


def processor() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1].strip() if found else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=list(WORKLOADS), help="parts of names")
    parser.add_argument("--no-models", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [name for name in WORKLOADS if any(part in name for part in args.only)]
    costs, parts = [], []
    for name in chosen:
        costs.append(cost_row(name, args.steps))
        parts.append(parts_row(name))
        print(costs[-1], parts[-1], flush=True)
    text = _TEXT.format(
        steps=args.steps,
        version=torch.__version__,
        costs=markdown(["", "plain step, ms", "run", "look"], costs),
        parts=markdown(["", *PARTS, *_AUTOGRAD], parts),
    )
    if not args.no_models:
        rows, pairs = [], []
        for name in MODELS:
            row, found = model_row(name)
            rows.append(row)
            pairs += found
            print(row, found, flush=True)
        distances = [d for pair in pairs for d in pair]
        text += "\n" + _MODELS.format(
            number=len(pairs),
            inside=sum(d <= 3 for d in distances),
            processor=processor(),
            models=markdown(
                ["", "profiles", "radius", "exact radius", "exponent", "exact exponent", "cost", "exact"],
                rows,
            ),
            slow=markdown(
                ["", "subnormal steps", "reverse pass"],
                [slow_row(name) for name in SLOW],
            ),
        )
    print(text)
    if args.write:
        page = PAGE.read_text(encoding="utf-8")
        block = f"<!-- recurrent -->\n{text}<!-- end of recurrent -->\n"
        known = re.compile("<!-- recurrent -->.*<!-- end of recurrent -->\n", flags=re.S)
        page = known.sub(lambda _: block, page) if known.search(page) else f"{page}\n{block}"
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
