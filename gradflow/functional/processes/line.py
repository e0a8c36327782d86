"""The line between processes: exchanges that all arrive at before any begins, and an end that all hear of.

NOTE [No process waits for one that does not come]
A collective in which one process is missing blocks the others: under gloo until its timeout (half an hour),
under NCCL likewise, after which it tears the process down. So none is begun before all have arrived at it.
They tell one another through the store, which is not bound to a backend: each adds one to a counter, the last
to come sets a key, and who waits for that key looks as well whether somebody has failed. A process that
raises says so in the store, with its message, and is never missed in a collective. None leaves before the
others have heard: it may hold the store.

One that is killed says nothing. A thread of every process writes a sign of life each second, and watches that
of the next process in the ring: where it stays away, that one is reported as failed. It also runs while the
process itself is inside a collective of the model's own (`SyncBatchNorm`), for which the timeout of its
groups is short for the length of the analysis.

Each analysis has a number, the same on all: how many have ended before it, which the store keeps.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from gradflow.errors import ProcessError
from gradflow.functional.processes.failing import falls_silent, gone, is_broken_line, some, take_leave
from gradflow.functional.processes.group import Axis, Processes
from gradflow.functional.processes.packing import Counts, buckets, device_of
from gradflow.functional.torch_private import default_store, set_timeout, timeout_of
from gradflow.records import Floats

PATIENCE = 60.0  # seconds in which all must have begun
SILENCE = 12.0  # seconds without a sign of life after which a process is taken for dead
BEAT = 1.0  # seconds between signs of life
BOUND = datetime.timedelta(seconds=20)  # of a collective that all have arrived at
FAREWELL = 3.0  # seconds in which all hear why the analysis ends, but those that are held up
_SHORTEST, _LONGEST = 0.0002, 0.02  # seconds between two looks for a key

_T = TypeVar("_T")


class BatchesEnded(Exception):
    """Another process has no batch for this step; never seen by a user."""


class Line:
    """The line to the other processes of one analysis; see NOTE [No process waits for one that does not
    come].

    Args:
        processes: those that it runs on.
        above: the line to more processes, of which these are some; what fails there ends this one as well.
    """

    def __init__(self, processes: Processes | None = None, above: Line | None = None) -> None:
        self.processes = processes or Processes()
        self._above = None if above is None or above.alone else above
        self.counts = Counts()
        self.alone = not self.processes.axes
        self._thread: threading.Thread | None = None
        if not self.alone:
            group = self.processes.group
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
            self.ranks = dist.get_process_group_ranks(group)
            self._device = device_of(group)

    # ------------------------------------------------------------------------- beginning and end

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Begin together, and end together: with an error of one, all raise.

        Raises:
            ProcessError: if another process raised, died, or never began.
        """
        if self.alone:
            yield
            return
        stop = threading.Event()
        groups = {id(axis.group): axis.group for axis in self.processes.axes}
        before = [(group, timeout_of(group)) for group in groups.values()]
        try:
            self._begin(stop)
            for group, _ in before:
                set_timeout(group, BOUND)
            yield
            self._end()
        except BaseException as error:
            try:
                self._tell(error)
            finally:
                take_leave(self._store, self.size, patience=FAREWELL)
            raise
        finally:
            stop.set()
            if self._thread is not None:  # one that runs on while the interpreter ends would abort it
                self._thread.join(5 * BEAT)
            for group, timeout in before:
                set_timeout(group, timeout)

    def _begin(self, stop: threading.Event) -> None:
        base = default_store()
        names = (
            "-".join(map(str, self.ranks))
            if self.size < 8
            else hashlib.sha256(repr(self.ranks).encode()).hexdigest()
        )
        self._root = PrefixStore(f"gradflow/{names}", base)
        self._epoch = self._root.add("ended", 0)
        self._store = PrefixStore(f"{self._epoch}", self._root)
        self._number = 0
        self._store.set(f"here/{self.rank}", "")
        self._thread = threading.Thread(target=self._live, args=(base.clone(), names, stop), daemon=True)
        self._thread.start()
        self.arrive(PATIENCE)

    def _end(self) -> None:
        """Wait until all are done; who finds the store gone by now has missed nothing."""
        try:
            self.arrive(last=True)
        except ProcessError as error:
            if not isinstance(error.__cause__, dist.DistNetworkError):
                raise

    def _tell(self, error: BaseException) -> None:
        """Tell the others why this process goes no further; raise what another has said before, if it did."""
        if isinstance(error, ProcessError) and error.told:
            if self._above is not None:  # which may be where it was told
                with contextlib.suppress(RuntimeError):
                    self._fail(f"\n{error}")
            return
        ours = isinstance(error, ProcessError)
        if not ours and is_broken_line(error):
            self._wait_for_reason(error)
        with contextlib.suppress(RuntimeError):
            said = str(error).strip() or type(error).__name__
            text = said if ours else f"{type(error).__name__}: {said.splitlines()[0].rstrip('.')[:500]}"
            self._fail(f"\n{text}" if ours else f"{self.ranks[self.rank]}\n{text}")

    def _fail(self, text: str, root: Any = None, store: Any = None) -> None:
        """Say in the store, once, why the analysis ends; the next one has another number."""
        root, store = root or self._root, store or self._store
        if store.add("failures", 1) == 1:
            store.set("failed", text)
            root.add("ended", 1)

    def _check(self) -> None:
        """Raise if some process has said that it failed."""
        if self._above is not None:
            self._above._check()
        if not self._store.check(["failed"]):
            return
        rank, _, text = self._store.get("failed").decode().partition("\n")
        if not rank:
            raise ProcessError(text, told=True)
        raise ProcessError(
            f"process {rank} raised {text}; so the analysis ends on all processes. Nothing was changed.",
            told=True,
        )

    def _wait_for_reason(self, error: BaseException) -> None:
        """Wait for the report of a process that is gone, where an exchange broke down."""
        end = time.monotonic() + SILENCE + 5 * BEAT
        while time.monotonic() < end:
            try:
                self._check()
            except ProcessError as reason:
                raise reason from error
            except RuntimeError:
                break
            time.sleep(0.1)

    def _live(self, base: Any, names: str, stop: threading.Event) -> None:
        """Give signs of life, and watch those of the next process."""
        root = PrefixStore(f"gradflow/{names}", base)
        store = PrefixStore(f"{self._epoch}", root)
        other = (self.rank + 1) % self.size
        with contextlib.suppress(RuntimeError):  # the store itself is gone: whoever waits will see that
            if falls_silent(store, self.rank, other, stop, silence=SILENCE, beat=BEAT):
                store.add("lost", 1)
                self._fail(f"\n{gone(self.ranks[other], SILENCE)}", root, store)

    # --------------------------------------------------------------------------------- exchanges

    def arrive(self, patience: float | None = None, *, last: bool = False) -> None:
        """Wait until all processes have come as far as this one.

        Args:
            patience: seconds after which those that never came are given up; None waits as long as they live.
            last: whether the analysis ends here.

        Raises:
            ProcessError: if one of them has failed, or never came.
        """
        if self.alone:
            return
        self._number += 1
        number, began = self._number, time.monotonic()
        with self._answering():
            if self._store.add(f"at/{number}", 1) == self.size:
                for key in (f"at/{number - 1}", f"go/{number - 1}"):
                    self._store.delete_key(key)
                if last:
                    self._store.set("over", "")
                    self._root.add("ended", 1)
                self._store.set(f"go/{number}", "")
                return
            self._look_for(f"go/{number}", patience, began)

    def post(self, key: str, value: bytes = b"-") -> None:
        """Leave something for another process."""
        with self._answering():
            self._store.set(f"post/{key}", value)  # type: ignore[arg-type]

    def fetch(self, key: str) -> bytes:
        """Wait for what another process leaves there, however long it takes, and take it.

        Raises:
            ProcessError: if one of the processes has failed.
        """
        with self._answering():
            self._look_for(f"post/{key}")
            found = self._store.get(f"post/{key}")
            self._store.delete_key(f"post/{key}")
            return found

    def _look_for(self, key: str, patience: float | None = None, began: float = 0.0) -> None:
        pause = _SHORTEST
        while not self._store.check([key]):
            self._check()
            if patience is not None and time.monotonic() - began > patience:
                self._give_up(patience)
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST)

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except ProcessError:
            raise
        except RuntimeError as error:
            raise ProcessError(
                "the store through which the processes of the analysis find one another does not answer: the "
                f"process that holds it, usually 0, is gone ({str(error).splitlines()[0][:200]}).",
                told=True,
            ) from error

    def _give_up(self, patience: float) -> None:
        missing = [r for i, r in enumerate(self.ranks) if not self._store.check([f"here/{i}"])]
        text = (
            f"of {self.size} processes, {some(missing)} did not begin the analysis within {patience:.0f} "
            "seconds. Call it on every process, each with its own part of the batch, as training is; or, to "
            "measure this process alone, pass processes='alone'."
        )
        self._fail(f"\n{text}")
        raise ProcessError(text, told=True)

    def go_on(self) -> None:
        """Wait until all processes have come as far as this one, unless one has no batch any more.

        Raises:
            BatchesEnded: if it said so.
        """
        self.arrive()
        if not self.alone and self._store.check([f"end/{self._number}"]):
            raise BatchesEnded

    def end_batches(self) -> None:
        """Say, where the others go on to the next step, that this process has no batch for it."""
        if not self.alone:
            self._store.set(f"end/{self._number + 1}", "")
            self.arrive()

    def moved(self, exchange: Callable[[], _T]) -> _T:
        """Run an exchange between two processes that are both ready for it."""
        return self._run(exchange)

    def _together(self, exchange: Callable[[], _T]) -> _T:
        """Run a collective, once all have arrived at it."""
        self.arrive()
        return self._run(exchange)

    def _run(self, exchange: Callable[[], _T]) -> _T:
        try:
            return exchange()
        except ProcessError:
            raise
        except RuntimeError as error:
            self._wait_for_reason(error)
            raise ProcessError(
                "an exchange between the processes of the analysis failed: "
                f"{str(error).splitlines()[0][:300]}."
            ) from error

    def mean(self, tensors: Sequence[Tensor], axis: Axis) -> list[Tensor]:
        """Return the mean of tensors over the processes of an axis, as a trainer takes that of gradients.

        They are packed in buckets, of which each is one all-reduce.

        Args:
            tensors: dense; of the same shapes on all processes.
            axis: the axis.

        Raises:
            BatchesEnded: if a process has said instead that it has no batch.
        """
        found: dict[int, Tensor] = {}
        for bucket in buckets(tensors):
            flat = torch.cat([tensors[i].reshape(-1) for i in bucket])
            self.go_on()
            self._run(lambda flat=flat: dist.all_reduce(flat, group=axis.group))
            self.counts.note(flat.numel() * flat.element_size(), gradients=True)
            flat.div_(axis.size)
            for i, part in zip(bucket, flat.split([tensors[i].numel() for i in bucket]), strict=True):
                found[i] = part.view(tensors[i].shape)
        return [found[i] for i in range(len(tensors))]

    def reduced(self, values: Floats, axis: Axis, op: Any = None) -> Floats:
        """Return numbers reduced over the processes of an axis, in one all-reduce.

        Args:
            values: a vector, of the same length on all.
            axis: the axis.
            op: of `torch.distributed.ReduceOp`; None adds.
        """
        if self.alone or not len(values):
            return values
        flat = torch.tensor(values, dtype=torch.float64, device=self._device)
        self._together(lambda: dist.all_reduce(flat, op or dist.ReduceOp.SUM, group=axis.group))
        self.counts.note(flat.numel() * 8)
        return flat.cpu().numpy()

    def gathered(self, value: Any, to: int | None = None) -> list[Any]:
        """Return what every process has given, in the order of their ranks.

        Args:
            value: what this one gives.
            to: the rank of the only process that gets it, the others get an empty list; None for all.
        """
        if self.alone:
            return [value]
        group, mine = self.processes.group, to in (None, dist.get_rank())
        found: list[Any] = [None] * (self.size if mine else 0)
        if to is None:
            self._together(lambda: dist.all_gather_object(found, value, group=group))
        else:
            self._together(lambda: dist.gather_object(value, found if mine else None, to, group))
        longest = max(len(pickle.dumps(other)) for other in found or [value])  # to which all are padded
        self.counts.note(longest, gathered=to is None)
        return found

    def agreed(self, value: Any) -> list[Any] | None:
        """Return None if all processes have given the same, else what each has, in the order of their ranks.

        Only a digest of its `repr` is exchanged where they are the same.
        """
        if self.alone:
            return None
        digest = hashlib.sha256(repr(value).encode()).digest()[:8]
        mine = float(int.from_bytes(digest[:6], "big"))  # exact in a float
        both = self.extremes(np.array([mine, -mine]))
        return None if both[0] == -both[1] else self.gathered(value)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process."""
        return flag if self.alone else bool(self.extremes(np.array([float(flag)]))[0])

    def extremes(self, values: Floats) -> Floats:
        """Return the largest of all processes of every number, in one exchange.

        Args:
            values: a vector, of the same length on all; no NaN.
        """
        if self.alone or not len(values):
            return values
        flat = torch.tensor(values, dtype=torch.float64, device=self._device)
        self._together(lambda: dist.all_reduce(flat, dist.ReduceOp.MAX, group=self.processes.group))
        self.counts.note(flat.numel() * 8)
        return flat.cpu().numpy()

    def largest(self, values: Tensor) -> Tensor:
        """Return the largest of all processes of every one of some small whole numbers (of one byte each)."""
        if self.alone or not values.numel():
            return values
        flat = values.to(self._device, torch.uint8)
        self._together(lambda: dist.all_reduce(flat, dist.ReduceOp.MAX, group=self.processes.group))
        self.counts.note(flat.numel())
        return flat.cpu()
