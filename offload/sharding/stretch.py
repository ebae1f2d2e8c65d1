"""What is saved between two backwards of a step, agreed on and gathered together."""

import contextlib
import time
import weakref

from torch import Tensor

from offload.ledger import Ledger
from offload.sharding.agreement import Agreement
from offload.sharding.channel import Channel
from offload.sharding.courier import serve
from offload.sharding.gathers import Gathers, ShardLease, range_bytes
from offload.sharding.waiting import Waiting


class Stretch:
    """One log, and the gathers of what it agreed on. Leases own it; it refers to them weakly.

    Args:
        channel: to the other ranks.
        agreement: of this stretch.
        number: of the store, the step and the stretch, the same on all ranks.
        waiting: for how long closing waits.
        ledger: charged for what was gathered.
    """

    def __init__(
        self,
        channel: Channel,
        agreement: Agreement,
        *,
        number: tuple[int, int, int],
        waiting: Waiting,
        ledger: Ledger,
    ) -> None:
        self.agreement = agreement
        self.is_closed = False
        self._channel = channel
        self._waiting = waiting
        self._untold: list[bytes] = []
        self._has_told = False
        self._leases: weakref.WeakValueDictionary[bytes, ShardLease] = weakref.WeakValueDictionary()
        self._gathers = Gathers(channel, number, ledger=ledger, lease_of=self._leases.get, ask=agreement.ask)

    def announce(self, digest: bytes) -> None:
        """Tell it at the next look."""
        self._untold.append(digest)

    def look(self) -> None:
        """Tell and read."""
        try:
            if self.agreement.is_closed:
                return
            if self._untold:
                self._has_told = True
                self.agreement.announce(self._untold)
                self._untold.clear()
            elif self._has_told:  # nothing is agreed without this rank
                self.agreement.read()
        except RuntimeError as error:
            self._channel.lose_store(error)

    def lease(self, flat: Tensor, digest: bytes) -> ShardLease | None:
        """Return the lease of these bytes, a new one where none lives and no header has told so."""
        lease = self._leases.get(digest)
        if lease is None and not self._gathers.has_begun:
            longest = range_bytes(flat.numel(), self._channel.num_ranks)
            own = flat[self._channel.rank * longest : (self._channel.rank + 1) * longest].clone()
            lease = ShardLease(own, digest=digest, num_all_bytes=flat.numel(), stretch=self)
            self._leases[digest] = lease
        return lease

    def read(self, lease: ShardLease) -> Tensor:
        """Return all bytes of a lease."""
        return self._gathers.read(lease)

    def close(self, *, patiently: bool) -> None:
        """Fix what is agreed, waiting for the other ranks where that is wanted."""
        began = time.monotonic()
        self.look()
        self.is_closed = True
        try:
            if not self._has_told:
                self.agreement.leave()
                return
            self.agreement.close()
            if patiently:
                self._waiting.wait_for(self.agreement)
            if not self.agreement.is_closed:
                self.agreement.end()
        except RuntimeError as error:
            self._channel.lose_store(error)
        finally:
            self._channel.waited_seconds += time.monotonic() - began
        self._gathers.fix(self.agreement.order())

    def begin_serving(self) -> None:
        """Let other ranks ask for what is agreed: it is leased now."""
        if not self._gathers.are_begun:
            serve(self, every_seconds=self._channel.look_seconds)

    def serve(self) -> bool:
        """Come to the gathers that another rank waits for; return whether there may be more."""
        with contextlib.suppress(RuntimeError), self._channel.lock:  # whoever reads here is told
            self.agreement.read()
            self._gathers.serve(self.agreement.asked)
            return not self._gathers.are_begun
        return False
