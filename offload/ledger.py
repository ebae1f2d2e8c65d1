"""Bytes held, now and at most: what came to be held and what ended stands in a log, in order, until it is
booked.

A save writes one line of it and the end of a save another: what the lines come to is reckoned many at a
time, while the caches are warm, and not between the operators of a step. Since the order is kept, the peak is
that of the moment.
"""

import threading
import weakref
from collections import deque

from offload.stats import Row

MOST_LINES = 1024


class Charge:
    """Bytes held for as long as this object lives (Law 8: its end takes no lock)."""

    __slots__ = ("__weakref__", "claim")
    claim: "Claim"


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

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.num_holders = 0
        self.step = -1


class Ledger:
    """Held bytes, now and at most, of holders that may end on any thread at any time."""

    def __init__(self) -> None:
        self.log: deque[tuple[Claim] | Claim | Row] = deque()
        """A claim in a tuple begins, a claim alone ends, and a row is a save of a parameter."""
        self._lock = threading.RLock()
        self._is_booking = False
        self._living: dict[int, Claim] = {}
        self._held: dict[int, _Held] = {}
        self._step = 0
        self._held_bytes = 0
        self._peak_bytes = 0
        self._storage_bytes = 0
        self._charged_bytes = 0

    def charge(
        self, num_bytes: int, *, key: int | None = None, storage_bytes: int = 0, row: Row | None = None
    ) -> Charge:
        """Return an object that holds `num_bytes` of its own, or with others what `key` is the identity of;
        whoever owns the memory owns it.
        """
        charge = Charge()
        key = id(charge) if key is None else key
        charge.claim = self.claim(charge, key=key, num_bytes=num_bytes, storage_bytes=storage_bytes, row=row)
        return charge

    def claim(
        self, holder: object, *, key: int, num_bytes: int, storage_bytes: int, row: Row | None = None
    ) -> Claim:
        """Note that `holder` holds what `key` is the identity of, `storage_bytes` of it counted among the
        storages of the step; with `row`, count it there as a save by reference.
        """
        log = self.log
        claim = Claim(holder, log.append)
        claim.key = key
        claim.num_bytes = num_bytes
        claim.storage_bytes = storage_bytes
        claim.row = row
        claim.added_bytes = 0
        log.append((claim,))
        if len(log) > MOST_LINES:
            self.book()
        return claim

    def end(self, claim: Claim) -> None:
        """Note that a holder lives on without what it held."""
        self.log.append(claim)

    def read(self) -> tuple[int, int]:
        """Return the held bytes now and their peak since the step began."""
        with self._lock:
            self.book()
            return self._held_bytes, self._peak_bytes

    @property
    def charged_bytes(self) -> int:
        """All that was ever added: the difference of two readings is what was added between them."""
        with self._lock:
            self.book()
            return self._charged_bytes

    @property
    def storage_bytes(self) -> int:
        """Bytes of the storages that were claimed since the step began, each once while it is held."""
        with self._lock:
            self.book()
            return self._storage_bytes

    def begin_step(self) -> None:
        """Start a new peak at what is held now, and count storages anew."""
        with self._lock:
            self.book()
            self._reckon_anew()
            self._peak_bytes = self._held_bytes
            self._storage_bytes = 0
            self._step += 1

    def _reckon_anew(self) -> None:
        """Hold what living holders do: an interrupt may have cut a line short."""
        living, self._held, self._held_bytes = list(self._living.values()), {}, 0
        for claim in living:
            if claim() is None:
                self._living.pop(id(claim), None)
            else:
                self._hold(claim)

    def book(self) -> None:
        """Reckon what stands in the log."""
        with self._lock:
            if self._is_booking:
                return  # to a reader that the collector runs inside: the line being booked is still there
            try:
                self._is_booking = True
                self._book_log()
            finally:
                self._is_booking = False

    def _book_log(self) -> None:
        log, living = self.log, self._living
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
        self._living[id(claim)] = claim
        held = self._hold(claim)
        if held.num_holders == 1:
            claim.added_bytes = held.num_bytes
            self._charged_bytes += held.num_bytes
            if self._held_bytes > self._peak_bytes:
                self._peak_bytes = self._held_bytes
        if held.step != self._step:
            held.step = self._step
            self._storage_bytes += claim.storage_bytes
        if claim.row is not None:
            claim.row.count("reference", kept_bytes=claim.added_bytes)

    def _hold(self, claim: Claim) -> _Held:
        held = self._held.get(claim.key)
        if held is None:
            held = self._held[claim.key] = _Held(claim.num_bytes)
            self._held_bytes += claim.num_bytes
        held.num_holders += 1
        return held

    def _end(self, key: int) -> None:
        held = self._held.get(key)
        if held is None:
            return
        held.num_holders -= 1
        if not held.num_holders:
            del self._held[key]
            self._held_bytes -= held.num_bytes
