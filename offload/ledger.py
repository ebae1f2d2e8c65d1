"""Bytes held, now and at most: what came to be held and what ended stands in a log, in order, until it is
booked.

A save writes one line of it and the end of a save another: what the lines come to is reckoned many at a
time, while the caches are warm, and not between the operators of a step. Since the order is kept, the peak is
that of the moment.
"""

import threading
from collections import deque

from offload import books, fast
from offload.books import Claim
from offload.stats import Row

MOST_LINES = 1024


class Charge:
    """Bytes held for as long as this object lives (Law 8: its end takes no lock)."""

    __slots__ = ("__weakref__", "claim")
    claim: Claim


class Ledger:
    """Held bytes, now and at most, of holders that may end on any thread at any time."""

    def __init__(self) -> None:
        self.log: deque[tuple[Claim] | Claim | Row] = deque()
        """A claim in a tuple begins, a claim alone ends, and a row is a save of a parameter."""
        self._books = fast.Books(self.log, row=Row) if fast.Books is not None else books.Books(self.log)
        self._lock = threading.RLock()
        self._is_booking = False
        self.charged_bytes = 0
        """All that was ever charged on its own: the difference of two readings is what came between them."""

    def charge(
        self, num_bytes: int, *, key: int | None = None, storage_bytes: int = 0, row: Row | None = None
    ) -> Charge:
        """Return an object that holds `num_bytes` of its own, or with others what `key` is the identity of;
        whoever owns the memory owns it.
        """
        charge = Charge()
        if key is None:
            key = id(charge)
            self.charged_bytes += num_bytes
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
            return self._books.held_bytes, self._books.peak_bytes

    @property
    def storage_bytes(self) -> int:
        """Bytes of the storages that were claimed since the step began, each once while it is held."""
        with self._lock:
            self.book()
            return self._books.storage_bytes

    def begin_step(self) -> None:
        """Start a new peak at what is held now, and count storages anew."""
        with self._lock:
            self.book()
            self._books.begin_step()

    def book(self) -> None:
        """Reckon what stands in the log."""
        with self._lock:
            if self._is_booking:
                return  # to a reader that the collector runs inside: the line being booked is still there
            try:
                self._is_booking = True
                self._books.book()
            finally:
                self._is_booking = False
