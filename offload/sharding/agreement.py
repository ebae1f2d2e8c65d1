"""What the ranks of a group say they hold, in one order that all of them read alike.

A log to which each rank appends, kept by the store that the job's ranks met through: appending and reading
wait for that store alone, never for a rank. What is agreed follows from the log line by line, so that ranks
that have read less of it know less, and never something else.
"""

from collections.abc import Sequence

from torch.distributed.distributed_c10d import Store

_CLOSE = b"close"
_END = b"end"


class Agreement:
    """One log. Bytes are agreed, and numbered, at the line by which the last rank announced them.

    It is closed, and what follows is void, once all ranks wrote that they close it, or one that it ends.

    Args:
        store: of the job.
        key: the log's name in it, the same on all ranks.
        rank: this one's number in its group.
        num_ranks: in the group.
    """

    def __init__(self, store: Store, key: str, *, rank: int, num_ranks: int) -> None:
        self._store = store
        self._key = key
        self._rank = rank
        self._num_ranks = num_ranks
        self._num_read = 0
        self._is_told = False
        self._announced: dict[bytes, set[int]] = {}
        self._closing: set[int] = set()
        self.agreed: dict[bytes, int] = {}
        """The numbers of what is agreed, by digest, in rising order."""
        self.is_closed = False

    @property
    def is_closed_by_all(self) -> bool:
        """Whether every rank came to close it."""
        return len(self._closing) == self._num_ranks

    def announce(self, digests: Sequence[bytes]) -> None:
        """Say that this rank holds bytes with these digests, and will take part in gathering them."""
        self._tell(b",".join(digest.hex().encode() for digest in digests))

    def close(self) -> None:
        """Say that this rank announces no more."""
        self._tell(_CLOSE)

    def end(self) -> None:
        """Close it for all ranks."""
        self._tell(_END)

    def read(self) -> None:
        """Take in what was written since the last time."""
        if not self._is_told:
            return  # reading a name that nobody wrote would wait
        log: bytes = self._store.get(self._key)
        for line in log[self._num_read :].splitlines():
            rank, _, words = line.partition(b":")
            self._take(int(rank), words)
        self._num_read = len(log)

    def _tell(self, words: bytes) -> None:
        line = f"{self._rank}:{words.decode()}\n"
        self._store.append(self._key, line)  # type: ignore[attr-defined]
        self._is_told = True

    def _take(self, rank: int, words: bytes) -> None:
        if self.is_closed:
            return
        if words in (_CLOSE, _END):
            if words == _CLOSE:
                self._closing.add(rank)
            self.is_closed = words == _END or self.is_closed_by_all
            return
        for word in words.split(b","):
            digest = bytes.fromhex(word.decode())
            ranks = self._announced.setdefault(digest, set())
            ranks.add(rank)
            if len(ranks) == self._num_ranks:
                self.agreed.setdefault(digest, len(self.agreed))
