"""Saves whose operators may still be running: they wait, each thread's in order, until they have returned."""

import threading
import weakref
from collections import deque
from typing import NamedTuple

from offload.books import Claim
from offload.handle import Entry, Kept
from offload.layout import Layout
from offload.patience import Line
from offload.stats import Row

_BATCH_BYTES = 8 << 20
_BATCH_SAVES = 1024
"""Saves of so many bytes of storage, or so many of them, wait by reference before they are settled."""


class Pending(NamedTuple):
    """A save that has an entry. Weak: a graph that is dropped takes its entries along."""

    sequence: int
    entry: "weakref.ref[Entry]"
    layout: Layout
    row: Row
    claim: Claim
    num_bytes: int


class Late(NamedTuple):
    """A save by reference of a line whose saves are nobody else's once their operators have returned: nothing
    is asked of it before.
    """

    sequence: int
    kept: "weakref.ref[Kept]"
    row: Row
    line: Line
    claim: Claim
    num_bytes: int


def leave(save: Pending | Late) -> None:
    """Count a save that stays by reference."""
    save.row.count("reference", kept_bytes=save.claim.added_bytes)


class Queue:
    """The saves that wait, of all threads: sequence numbers of autograd are per thread, so is the order."""

    def __init__(self) -> None:
        self._mine = _Mine()
        self.num_saves = 0
        """Of all threads: mostly there are none, and no thread's own are looked at."""
        self._num_bytes = 0

    def put(self, save: Pending | Late) -> None:
        """Let a save wait."""
        self._mine.saves.append(save)
        self._mine.num_bytes += save.num_bytes
        self.num_saves += 1
        self._num_bytes += save.num_bytes

    def take(self, *, now: int | None) -> list[Pending | Late]:
        """Return what this thread saved under an earlier node than number `now`; all of it for None."""
        saves, taken = self._mine.saves, list[Pending | Late]()
        while saves and saves[0].sequence != now:
            taken.append(saves.popleft())
        num_bytes = sum(save.num_bytes for save in taken)
        self._mine.num_bytes -= num_bytes
        self.num_saves -= len(taken)
        self._num_bytes -= num_bytes
        return taken

    @property
    def is_due(self) -> bool:
        """Whether there may be a batch to settle, this thread's or another's."""
        return self._num_bytes > _BATCH_BYTES or self.num_saves > _BATCH_SAVES

    @property
    def is_mine_due(self) -> bool:
        """Whether this thread has a batch to settle."""
        return self._mine.num_bytes > _BATCH_BYTES or len(self._mine.saves) > _BATCH_SAVES


class _Mine(threading.local):
    def __init__(self) -> None:
        self.saves: deque[Pending | Late] = deque()
        self.num_bytes = 0
