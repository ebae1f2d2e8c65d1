"""Process groups of a store's own, waited on for a bounded time."""

import contextlib
import ctypes
import math
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import (  # type: ignore[attr-defined]
    AllgatherOptions,
    ProcessGroupGloo,
)

from offload.errors import RankMismatchError
from offload.sharding.job_store import JobStore

_LOOK_SECONDS = 0.5
"""How often a rank that waits looks whether another has given up, and one that does not whether it is waited
for.
"""
_CALL_SECONDS = 2.0
"""How long ranks have to answer one that has given up, at most."""
_PAUSE_SECONDS = 0.005
_LEAST_SECONDS = 0.001
"""Gloo counts in milliseconds and takes 0 for no limit at all."""
_OPERATION = timedelta(days=1)
"""Gloo's own limit. A gather may lie ahead for as long as a rank is busy; who waits for it has a clock."""


class Arriving(NamedTuple):
    """A gather on its way: `rows`, `[num_ranks, n]`, are there once `work` is done."""

    rows: Tensor
    work: dist.Work


class Channel:
    """Gathers among a group's ranks, apart from all other traffic.

    Headers and bytes each have a process group of gloo, made at the first gather: by then every rank has
    agreed to something, and comes. All headers are equally long, and bytes go only where all headers agree on
    how many, so that what does not belong together is told by its content. Once a gather fails every later
    one fails alike.

    Args:
        group: whose ranks.
        store: of the job, to ask who is still there.
        timeout_seconds: for the others to come to a gather.
    """

    def __init__(self, group: dist.ProcessGroup, *, store: JobStore, timeout_seconds: float) -> None:
        self.rank = dist.get_rank(group)
        self.num_ranks = dist.get_world_size(group)
        self.lock = threading.RLock()
        self.failure: str | None = None
        self.gathered_bytes = 0
        self.waited_seconds = 0.0
        self.timeout_seconds = timeout_seconds
        # Closing a stretch, the gather and asking who is still there take one timeout together.
        self.patience_seconds = timeout_seconds / 4
        self.look_seconds = min(_LOOK_SECONDS, timeout_seconds / 8)
        self._call_seconds = min(_CALL_SECONDS, timeout_seconds / 8)
        self._deadline = 0.0
        self._store = store
        self._roads: dict[str, _Road] = {}
        weakref.finalize(self, _leave, self._roads)

    def begin_read(self) -> None:
        """Start the clock for all that one read waits for."""
        self._deadline = time.monotonic() + (
            self.timeout_seconds - self.patience_seconds - self._call_seconds
        )

    def gather_headers(self, own: Tensor) -> Arriving:
        """Begin to gather `own`, uint8 `[n]` with the n of all headers."""
        self.require_whole()
        began = time.monotonic()
        try:
            if not self._roads:
                self._meet()
                self._roads |= {name: _Road(self._private_group(name)) for name in ("headers", "bytes")}
            return self._roads["headers"].gather(own, num_ranks=self.num_ranks)
        except RankMismatchError:
            raise
        except RuntimeError as error:
            raise self._give_up(error) from error
        finally:
            self.waited_seconds += time.monotonic() - began

    def gather_bytes(self, own: Tensor) -> Arriving:
        """Begin to gather `own`, uint8 `[n]` with the same n on all ranks, after a header said so."""
        self.require_whole()
        try:
            arriving = self._roads["bytes"].gather(own, num_ranks=self.num_ranks)
        except RuntimeError as error:
            raise self._give_up(error) from error
        self.gathered_bytes += arriving.rows.nbytes - own.nbytes
        return arriving

    @property
    def has_met(self) -> bool:
        """Whether all ranks have come to a gather."""
        return bool(self._roads)

    def wait(self, arriving: Arriving, *, remind: Callable[[], None] | None = None) -> Tensor:
        """Return the gathered rows. Where they do not come soon, `remind` is called, once.

        Raises:
            RankMismatchError: they do not come; it names the ranks that are missing.
        """
        work = arriving.work
        began = time.monotonic()
        try:
            while not work.is_completed():
                self.require_whole()
                left = self._deadline - time.monotonic()
                if left < _LEAST_SECONDS or self._has_one_given_up():
                    raise self._give_up(None)
                _look(work, seconds=min(left, self.look_seconds))
                if remind is not None and not work.is_completed():
                    remind()
                    remind = None
            work.wait()
        except RankMismatchError:
            raise
        except RuntimeError as error:
            raise self._give_up(error) from error
        finally:
            self.waited_seconds += time.monotonic() - began
        return arriving.rows

    def fail(self, message: str) -> RankMismatchError:
        """Return the error that every gather from here on raises: the first failure."""
        if self.failure is None:
            self.failure = message
            for road in self._roads.values():
                road.abandon()  # what is under way will not come
        return RankMismatchError(self.failure)

    def require_whole(self) -> None:
        """Raise RankMismatchError after a failure."""
        if self.failure is not None:
            raise RankMismatchError(self.failure)

    def _meet(self) -> None:
        """Wait for all ranks to come to their first gather."""
        if self._absent("met", until=self._deadline):
            raise self._give_up(None)

    def _private_group(self, name: str) -> ProcessGroupGloo:
        left = max(1.0, self._deadline - time.monotonic())
        return ProcessGroupGloo(self._store.below(name), self.rank, self.num_ranks, timedelta(seconds=left))

    def _has_one_given_up(self) -> bool:
        return self._store.get("lost") is not None

    def _give_up(self, error: RuntimeError | None) -> RankMismatchError:
        """Ask who is still there, and return the error that names the others, alike on all that are."""
        if self.failure is not None:
            return RankMismatchError(self.failure)
        try:
            missing = self._absent("lost", until=time.monotonic() + self._call_seconds)
        except RuntimeError as lost:
            return self.lose_store(lost)
        if missing:
            seen = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} of the group did not come"
            cause = "stopped, were killed, or do not run this backward"
        else:
            seen = f"the ranks of the group did not come together ({type(error).__name__})"
            cause = "may run backwards that differ, or have lost their connection"
        return self.fail(
            f"{seen} to the all-gather of it within {self.timeout_seconds:g} s: they {cause}. Run the same "
            'backward on all ranks, or share with shard="shared-memory", which waits for nobody.'
        )

    def lose_store(self, error: RuntimeError) -> RankMismatchError:
        """Return the error for a job's store that does not answer."""
        return self.fail(
            f"the store through which the ranks of the job met is gone ({str(error).splitlines()[0]}): the "
            "rank or the launcher that runs it has ended or stopped."
        )

    def _absent(self, name: str, *, until: float) -> list[int]:
        """Say that this rank came to `name`, and return the ranks that do not until then."""
        came = self._store.append(name, f"{self.rank},")
        while True:
            ranks = came.decode().split(",")
            absent = [rank for rank in range(self.num_ranks) if str(rank) not in ranks]
            if not absent or time.monotonic() > until:
                return absent
            time.sleep(_PAUSE_SECONDS)
            came = self._store.get(name) or b""


class _Road:
    """A process group, and what was last begun on it."""

    def __init__(self, group: ProcessGroupGloo) -> None:
        self._group = group
        self._last: dist.Work | None = None

    def gather(self, own: Tensor, *, num_ranks: int) -> Arriving:
        """Begin to gather `own` of each rank."""
        rows = own.new_empty(num_ranks, own.numel())
        options = AllgatherOptions()
        options.timeout = _OPERATION
        self._last = self._group.allgather([list(rows.unbind())], [own], options)  # type: ignore[attr-defined]
        return Arriving(rows, self._last)

    @property
    def is_busy(self) -> bool:
        """Whether something is under way."""
        return self._last is not None and not self._last.is_completed()

    def abandon(self) -> None:
        """Keep the process group for ever: its end would wait for others to come to what is under way."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._group))


def _leave(roads: Mapping[str, _Road]) -> None:
    """End the process groups, but for those whose end would wait (Law 8)."""
    for road in roads.values():
        if road.is_busy:
            road.abandon()


def _look(work: dist.Work, *, seconds: float) -> None:
    """Wait for so long. Not to learn how it ended: it may end just after the time was up."""
    with contextlib.suppress(RuntimeError):
        work.wait(timedelta(milliseconds=math.ceil(seconds * 1000)))
