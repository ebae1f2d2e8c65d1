"""What the lines of a ledger's log come to. `offload/_books.c` does the same where it was compiled."""

import weakref
from collections import deque

from offload.stats import Row


class Claim(weakref.ref[object]):
    """That something is held, `num_bytes` large, for as long as its holder lives; several holders of one
    `key` hold it once.

    It stands in the log as it is made, in a tuple, and alone at its holder's end, before what the holder
    holds is freed: a key may be an identity that comes back later. `added_bytes` is known once it is booked.
    """

    __slots__ = ("added_bytes", "key", "num_bytes", "row", "storage_bytes")
    added_bytes: int
    key: int
    num_bytes: int
    row: Row | None
    storage_bytes: int


class _Held:
    """What has holders."""

    __slots__ = ("num_bytes", "num_holders", "step")

    def __init__(self) -> None:
        self.num_bytes = 0
        self.num_holders = 0
        self.step = -1


class Books:
    """Held bytes, now and at most, as of the last line of `log` that was booked. For one thread at a time."""

    def __init__(self, log: "deque[tuple[Claim] | Claim | Row]") -> None:
        self._log = log
        self._step = 0
        self.living: dict[int, Claim] = {}
        self.held: dict[int, _Held] = {}
        self.held_bytes = 0
        self.peak_bytes = 0
        self.storage_bytes = 0

    def begin_step(self) -> None:
        """Start a new peak at what is held now, and count storages anew."""
        self._reckon_anew()
        self.peak_bytes = self.held_bytes
        self.storage_bytes = 0
        self._step += 1

    def _reckon_anew(self) -> None:
        """Hold what living holders do: an interrupt may have cut a line short."""
        living, self.held, self.held_bytes = list(self.living.values()), {}, 0
        for claim in living:
            if claim() is None:
                self.living.pop(id(claim), None)
            else:
                self._hold(claim)

    def book(self) -> None:
        """Reckon what stands in the log."""
        log, living = self._log, self.living
        while log:
            line = log[0]  # an interrupt leaves it there
            if isinstance(line, tuple):
                if id(line[0]) not in living:  # it may be the line that an interrupt left
                    self._begin(line[0])
            elif isinstance(line, Row):
                line.count("parameter")
            elif living.pop(id(line), None) is not None:
                self._end(line.key)
            log.popleft()

    def _begin(self, claim: Claim) -> None:
        self.living[id(claim)] = claim
        claim.added_bytes = self._hold(claim)
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        held = self.held[claim.key]
        if held.step != self._step:
            held.step = self._step
            self.storage_bytes += claim.storage_bytes
        if claim.row is not None:
            claim.row.count("reference", kept_bytes=claim.added_bytes)

    def _hold(self, claim: Claim) -> int:
        """Count one more holder, of what may have grown since the last; return what came to be held."""
        held = self.held.get(claim.key)
        if held is None:
            held = self.held[claim.key] = _Held()
        added_bytes = max(claim.num_bytes - held.num_bytes, 0)
        held.num_bytes += added_bytes
        self.held_bytes += added_bytes
        held.num_holders += 1
        return added_bytes

    def _end(self, key: int) -> None:
        held = self.held.get(key)
        if held is None:
            return
        held.num_holders -= 1
        if not held.num_holders:
            del self.held[key]
            self.held_bytes -= held.num_bytes
