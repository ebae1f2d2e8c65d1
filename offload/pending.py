"""Saves whose operators may still be running: they wait, each thread's in order, until they have returned."""

import weakref
from collections import deque
from threading import get_ident
from typing import NamedTuple

from offload.books import Claim
from offload.handle import Entry, Kept
from offload.layout import Layout
from offload.patience import Line
from offload.stats import Row

BATCH_BYTES = 8 << 20
"""Saves of so many bytes of storage wait by reference before they are settled."""
LEAST_BYTES = 8 << 10
"""As which a smaller save counts: no more than a thousand wait."""


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
        self.arrivals: deque[tuple[int, int, Pending | Late]] = deque()
        """What came since the queue was looked at last, each with its thread and the bytes that it counts as:
        `_fast.c` puts some here, too.
        """
        self._by_thread: dict[int, _Waiting] = {}

    def put(self, save: Pending | Late) -> None:
        """Let a save of this thread wait."""
        self.arrivals.append((get_ident(), max(save.num_bytes, LEAST_BYTES), save))

    def take(self, *, now: int | None) -> list[Pending | Late]:
        """Return what this thread saved under an earlier node than number `now`; all of it for None."""
        self._sort()
        mine = self._by_thread.pop(get_ident(), None)
        if mine is None:
            return []
        if now is None:
            return list(mine.saves)
        taken = list[Pending | Late]()
        while mine.saves and mine.saves[0].sequence != now:
            taken.append(mine.saves.popleft())
            mine.num_bytes -= max(taken[-1].num_bytes, LEAST_BYTES)
        if mine.saves:
            self._by_thread[get_ident()] = mine
        return taken

    def take_left(self) -> list[Pending | Late]:
        """Return what any thread saved, once none is inside: the engine's threads never leave a context."""
        self._sort()
        left, self._by_thread = self._by_thread, {}
        return [save for each in left.values() for save in each.saves]

    @property
    def num_saves(self) -> int:
        """Saves that wait, of all threads."""
        return len(self.arrivals) + sum(len(each.saves) for each in self._by_thread.values())

    @property
    def room_bytes(self) -> int:
        """How much more may wait before there may be a batch to settle, this thread's or another's; negative
        once there is one.
        """
        self._sort()
        return BATCH_BYTES - max((each.num_bytes for each in self._by_thread.values()), default=0)

    @property
    def is_mine_due(self) -> bool:
        """Whether this thread has a batch to settle."""
        self._sort()
        mine = self._by_thread.get(get_ident())
        return (mine.num_bytes if mine is not None else 0) > BATCH_BYTES

    def _sort(self) -> None:
        arrivals, by_thread = self.arrivals, self._by_thread
        while arrivals:
            thread, num_bytes, save = arrivals.popleft()
            waiting = by_thread.get(thread)
            if waiting is None:
                waiting = by_thread[thread] = _Waiting()
            waiting.saves.append(save)
            waiting.num_bytes += num_bytes


class _Waiting:
    """One thread's."""

    __slots__ = ("num_bytes", "saves")

    def __init__(self) -> None:
        self.saves: deque[Pending | Late] = deque()
        self.num_bytes = 0
