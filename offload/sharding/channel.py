"""A process group of the store's own, waited on for a bounded time."""

import functools
import threading
import time
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from offload.errors import RankMismatchError

_LOOK_SECONDS = 0.5
"""How often a rank that waits looks whether another has given up."""
_CALL_SECONDS = 2.0
"""How long ranks have to answer one that has given up, at most."""
_PAUSE_SECONDS = 0.005


class Arriving(NamedTuple):
    """A gather on its way: `rows`, `[num_ranks, n]`, are there once `work` is done."""

    rows: Tensor
    work: dist.Work


class Channel:
    """Gathers among a group's ranks, apart from all other traffic.

    The process group is made at the first gather: by then every rank has agreed to something, and comes.
    Once a gather fails it is of no more use, and every later one fails alike.

    Args:
        group: whose ranks.
        store: of the job, to ask who is still there.
        key: a name in it.
        timeout_seconds: for the others to come to a gather.
    """

    def __init__(self, group: dist.ProcessGroup, *, store: Store, key: str, timeout_seconds: float) -> None:
        self.rank = dist.get_rank(group)
        self.num_ranks = dist.get_world_size(group)
        self.lock = threading.RLock()
        self.failure: str | None = None
        self.gathered_bytes = 0
        self.waited_seconds = 0.0
        self._group = group
        self._private: dist.ProcessGroup | None = None
        self._store = store
        self._key = key
        self.timeout_seconds = timeout_seconds
        # Closing a stretch, meeting at the first gather and asking who is still there: one timeout together.
        self.patience_seconds = timeout_seconds / 4
        self._call_seconds = min(_CALL_SECONDS, timeout_seconds / 8)
        self._most_seconds = timeout_seconds - self.patience_seconds - self._call_seconds

    def gather(self, own: Tensor) -> Arriving:
        """Begin to gather `own`, contiguous `[n]` on the CPU and as long on every rank."""
        self.require_whole()
        rows = own.new_empty(self.num_ranks, own.numel())
        began = time.monotonic()
        try:
            if self._private is None:
                self._meet()
                self._private = _private_group(self._group, self.timeout_seconds)
            work = dist.all_gather_single(rows.view(-1), own, group=self._private, async_op=True)
        except RankMismatchError:
            raise
        except RuntimeError as error:
            raise self._given_up(error) from error
        self.waited_seconds += time.monotonic() - began
        self.gathered_bytes += rows.nbytes - own.nbytes
        assert work is not None
        return Arriving(rows, work)

    def wait(self, arriving: Arriving) -> Tensor:
        """Return the gathered rows.

        Raises:
            RankMismatchError: they do not come; it names the ranks that are missing.
        """
        work = arriving.work
        began = time.monotonic()
        try:
            while not work.is_completed():
                self.require_whole()
                left = began + self._most_seconds - time.monotonic()
                if left <= 0 or self._has_one_given_up():
                    raise self._given_up(None)
                self._look(work, seconds=min(left, _LOOK_SECONDS))
            work.wait()
        except RankMismatchError:
            raise
        except RuntimeError as error:
            raise self._given_up(error) from error
        finally:
            self.waited_seconds += time.monotonic() - began
        return arriving.rows

    def require_whole(self) -> None:
        """Raise RankMismatchError if a gather has failed."""
        if self.failure is not None:
            raise RankMismatchError(self.failure)

    @staticmethod
    def _look(work: dist.Work, *, seconds: float) -> None:
        try:
            work.wait(timedelta(seconds=seconds))
        except RuntimeError:
            if work.is_completed():  # otherwise only this look is over
                raise

    def _has_one_given_up(self) -> bool:
        try:
            return bool(self._store.check([f"{self._key}/lost"]))
        except RuntimeError:
            return True

    def _given_up(self, error: RuntimeError | None) -> RankMismatchError:
        """Ask who is still there, and return the error that names the others, alike on all that are."""
        missing = self._missing()
        _private_group.cache_clear()  # after a timeout it is of no use to any store
        if missing:
            who = (
                f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} of the group did not come to "
            )
            cause = "stopped, were killed, or do not run this backward"
        else:
            who, cause = "the ranks came to different ones instead of ", "ran backwards that differ"
        self.failure = self.failure or (
            f"{who}the all-gather of it within {self.timeout_seconds:g} s: they {cause}. Run the same "
            'backward on all ranks, or share with shard="shared-memory", which waits for nobody.'
        )
        if error is not None and not missing:
            self.failure += f" ({str(error).splitlines()[0]})"
        return RankMismatchError(self.failure)

    def _meet(self) -> None:
        """Wait for all ranks to come to their first gather."""
        if self._absent("met", seconds=self._most_seconds):
            raise self._given_up(None)

    def _missing(self) -> list[int]:
        """Return the ranks that do not answer, none if the job's store is gone."""
        try:
            return self._absent("lost", seconds=self._call_seconds)
        except RuntimeError:
            return []

    def _absent(self, name: str, *, seconds: float) -> list[int]:
        """Say that this rank came to `name`, and return the ranks that do not within `seconds`."""
        key = f"{self._key}/{name}"
        self._store.append(key, f"{self.rank},")  # type: ignore[attr-defined]
        until = time.monotonic() + seconds
        while True:
            came = self._store.get(key).decode().split(",")
            absent = [rank for rank in range(self.num_ranks) if str(rank) not in came]
            if not absent or time.monotonic() > until:
                return absent
            time.sleep(_PAUSE_SECONDS)


@functools.lru_cache(maxsize=8)
def _private_group(group: dist.ProcessGroup, timeout_seconds: float) -> dist.ProcessGroup:
    """Return a group of the same ranks with traffic and a timeout of its own, the same for every store."""
    private = dist.new_group(
        dist.get_process_group_ranks(group),
        timeout=timedelta(seconds=timeout_seconds),
        backend="gloo",
        use_local_synchronization=True,
    )
    assert isinstance(private, dist.ProcessGroup)
    return private


def zeros_after(shard: Tensor, num_bytes: int) -> Tensor:
    """Return `shard`, uint8 `[m]`, with zeros behind it up to `num_bytes`."""
    if shard.numel() == num_bytes:
        return shard
    return torch.cat([shard, shard.new_zeros(num_bytes - shard.numel())])
