"""A policy that measures what it takes another to find out what ranks agree on."""

import time

from torch import Tensor

from offload.ledger import Ledger
from offload.part import Lease
from offload.sharding.base import Sharding, Traffic


class Timed(Sharding):
    """Runs `policy`, and adds up the processor's seconds in what it does in forward to reach agreement."""

    def __init__(self, policy: Sharding) -> None:
        self._policy = policy
        self.seconds = 0.0

    @property
    def is_joined(self) -> bool:
        """As the policy says."""
        return self._policy.is_joined

    @property
    def is_near(self) -> bool:
        """As the policy says."""
        return self._policy.is_near

    @property
    def traffic(self) -> Traffic:
        """As the policy says."""
        return self._policy.traffic

    def begin_step(self, ledger: Ledger) -> None:
        """Begin a step."""
        began = time.process_time()
        self._policy.begin_step(ledger)
        self.seconds += time.process_time() - began

    def look(self) -> None:
        """Look."""
        began = time.process_time()
        self._policy.look()
        self.seconds += time.process_time() - began

    def announce(self, digest: bytes) -> None:
        """Announce."""
        began = time.process_time()
        self._policy.announce(digest)
        self.seconds += time.process_time() - began

    def num_holders(self, digest: bytes) -> int:
        """Count."""
        began = time.process_time()
        found = self._policy.num_holders(digest)
        self.seconds += time.process_time() - began
        return found

    def place(self, flat: Tensor, digest: bytes) -> Lease | None:
        """Share: no part of the agreement."""
        return self._policy.place(flat, digest)

    def close(self, *, patiently: bool) -> bool:
        """Close: backward has begun."""
        return self._policy.close(patiently=patiently)

    def group_held_bytes(self, held_bytes: int) -> int:
        """As the policy says."""
        return self._policy.group_held_bytes(held_bytes)
