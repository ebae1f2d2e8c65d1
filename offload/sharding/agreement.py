"""What the ranks of a group say they hold, in one order that all of them read alike.

A log to which each rank appends, kept by the store that the job's ranks met through: appending and reading
wait for that store alone, never for a rank. What is agreed follows from the log line by line, so that ranks
that have read less of it know less, and never something else.

Agreed is what stands in one order on all ranks: a rank that gathers what another needs only later might wait
for it while the other waits in a collective of the model.
"""

from bisect import bisect
from collections.abc import Sequence
from itertools import pairwise
from operator import lt

from offload.sharding.job_store import JobStore

_CLOSE = "close"
_END = "end"
_ASK = "ask "
_Places = tuple[int, ...]  # of one announcement, in each rank's own sequence


class Agreement:
    """One log. Bytes are agreed at the line by which the last rank announced them, unless some rank announced
    them before, and another behind, something agreed already.

    It is closed, and what follows is void, once all ranks wrote that they close it, or one that it ends.

    Args:
        store: of the job.
        name: the log's in it, the same on all ranks.
        rank: this one's number in its group.
        num_ranks: in the group.
    """

    def __init__(self, store: JobStore, name: str, *, rank: int, num_ranks: int) -> None:
        self.name = name
        self.is_closed = False
        self.asked = -1
        """The last gather that some rank asked the others to come to."""
        self._store = store
        self._rank = rank
        self._num_ranks = num_ranks
        self._log = b""
        self._announced: dict[bytes, dict[int, int]] = {}
        self._num_announced = [0] * num_ranks
        self._agreed: dict[bytes, _Places] = {}
        self._chain: list[_Places] = []
        self._closing: set[int] = set()

    def __contains__(self, digest: bytes) -> bool:
        """Whether these bytes are agreed."""
        return digest in self._agreed

    def order(self) -> list[bytes]:
        """Return the digests of what is agreed, in the order in which all ranks announced them."""
        return sorted(self._agreed, key=self._agreed.__getitem__)

    def announce(self, digests: Sequence[bytes]) -> None:
        """Say that this rank holds bytes with these digests, and will take part in gathering them."""
        self._tell(",".join(digest.hex() for digest in digests))

    def close(self) -> None:
        """Say that this rank announces no more."""
        self._tell(_CLOSE)

    def end(self) -> None:
        """Close it for all ranks."""
        self._tell(_END)

    def leave(self) -> None:
        """Close it for all ranks, without a look at what they wrote: this one announced nothing."""
        self.is_closed = True
        self._store.tell(self.name, f"{self._rank}:{_END}\n")

    def ask(self, place: int) -> None:
        """Ask the other ranks to come to a gather, by its number."""
        self._tell(f"{_ASK}{place}")

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
            if words.startswith(_ASK):
                self.asked = max(self.asked, int(words.removeprefix(_ASK)))
            elif not self.is_closed:
                self._take(int(rank), words)
        self._log = log

    def _take(self, rank: int, words: str) -> None:
        if words in (_CLOSE, _END):
            if words == _CLOSE:
                self._closing.add(rank)
            self.is_closed = words == _END or len(self._closing) == self._num_ranks
            return
        found: dict[bytes, _Places] = {}
        for word in words.split(","):
            digest = bytes.fromhex(word)
            places = self._announced.setdefault(digest, {})
            places.setdefault(rank, self._num_announced[rank])
            self._num_announced[rank] += 1
            if len(places) == self._num_ranks and digest not in self._agreed:
                found[digest] = tuple(places[each] for each in range(self._num_ranks))
        # What one rank announced far from where the others did would keep out all that lies between.
        for digest, each in sorted(found.items(), key=lambda item: max(item[1]) - min(item[1])):
            self._agree(digest, each)

    def _agree(self, digest: bytes, places: _Places) -> None:
        at = bisect(self._chain, places)
        neighbours = (*self._chain[max(at - 1, 0) : at], places, *self._chain[at : at + 1])
        if all(_is_before(one, other) for one, other in pairwise(neighbours)):
            self._chain.insert(at, places)
            self._agreed[digest] = places


def _is_before(one: _Places, other: _Places) -> bool:
    """Return whether all ranks announced `one` before `other`."""
    return all(map(lt, one, other))
