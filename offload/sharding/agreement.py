"""What the ranks of a group say they hold, in one order that all of them read alike.

A log to which each rank appends, kept by the store that the job's ranks met through: appending and reading
wait for that store alone, never for a rank. What is agreed follows from the log line by line, so that ranks
that have read less of it know less, and never something else.
"""

from collections.abc import Sequence

from offload.sharding.job_store import JobStore

_CLOSE = "close"
_END = "end"


class Agreement:
    """One log. Bytes are agreed, and numbered, at the line by which the last rank announced them.

    It is closed, and what follows is void, once all ranks wrote that they close it, or one that it ends.

    Args:
        store: of the job.
        name: the log's in it, the same on all ranks.
        rank: this one's number in its group.
        num_ranks: in the group.
    """

    def __init__(self, store: JobStore, name: str, *, rank: int, num_ranks: int) -> None:
        self.name = name
        self.agreed: dict[bytes, int] = {}
        """The numbers of what is agreed, by digest, in rising order."""
        self.is_closed = False
        self._store = store
        self._rank = rank
        self._num_ranks = num_ranks
        self._log = b""
        self._announced: dict[bytes, set[int]] = {}
        self._closing: set[int] = set()

    @property
    def is_closed_by_all(self) -> bool:
        """Whether every rank came to close it."""
        return len(self._closing) == self._num_ranks

    def announce(self, digests: Sequence[bytes]) -> None:
        """Say that this rank holds bytes with these digests, and will take part in gathering them."""
        self._tell(",".join(digest.hex() for digest in digests))

    def close(self) -> None:
        """Say that this rank announces no more."""
        self._tell(_CLOSE)

    def end(self) -> None:
        """Close it for all ranks."""
        self._tell(_END)

    def read(self) -> None:
        """Take in what was written since the last time."""
        self._take_in(self._store.get(self.name) or b"")

    def _tell(self, words: str) -> None:
        self._take_in(self._store.append(self.name, f"{self._rank}:{words}\n"))

    def _take_in(self, log: bytes) -> None:
        if not log.startswith(self._log):
            self.is_closed = True  # it was removed: the others are steps ahead
            return
        for line in log[len(self._log) :].decode().splitlines():
            rank, _, words = line.partition(":")
            if not self.is_closed:
                self._take(int(rank), words)
        self._log = log

    def _take(self, rank: int, words: str) -> None:
        if words in (_CLOSE, _END):
            if words == _CLOSE:
                self._closing.add(rank)
            self.is_closed = words == _END or self.is_closed_by_all
            return
        for word in words.split(","):
            digest = bytes.fromhex(word)
            ranks = self._announced.setdefault(digest, set())
            ranks.add(rank)
            if len(ranks) == self._num_ranks:
                self.agreed.setdefault(digest, len(self.agreed))
