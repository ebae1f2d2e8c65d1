"""How long a rank that closes a stretch waits for the others to get there too."""

import time

from offload.sharding.agreement import Agreement
from offload.sharding.job_store import JobStore

_LEAST_PAUSE_SECONDS = 0.0005
_MOST_PAUSE_SECONDS = 0.01
_LEAST_SECONDS = 0.01


class Waiting:
    """Patience, which ranks that do not come use up, and those that come give back.

    Args:
        store: of the job; this rank says in it that it is there.
        rank: this one's number in its group.
        num_ranks: in the group. Until all of them are there, an eighth of the time must do: one may never
            come.
        most_seconds: to wait for.
    """

    def __init__(self, store: JobStore, *, rank: int, num_ranks: int, most_seconds: float) -> None:
        self.seconds = most_seconds
        self._most_seconds = most_seconds
        self._store = store
        self._num_ranks = num_ranks
        self._are_all_there = False
        store.append("there", f"{rank},")

    def wait_for(self, agreement: Agreement) -> None:
        """Wait until it is closed, for a while."""
        until = time.monotonic() + (self.seconds if self._are_there() else self.seconds / 8)
        pause_seconds = _LEAST_PAUSE_SECONDS
        while not agreement.is_closed and time.monotonic() < until:
            time.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, _MOST_PAUSE_SECONDS)
            agreement.read()
        if self._are_all_there:
            changed = 2 * self.seconds if agreement.is_closed else self.seconds / 4
            self.seconds = max(_LEAST_SECONDS, min(self._most_seconds, changed))

    def _are_there(self) -> bool:
        if not self._are_all_there:
            there = (self._store.get("there") or b"").decode().split(",")
            self._are_all_there = len(set(there) - {""}) == self._num_ranks
        return self._are_all_there
