"""Every rank for itself."""

from torch import Tensor

from offload.ledger import Ledger
from offload.part import Lease
from offload.sharding.base import Sharding


class Local(Sharding):
    """Shares nothing."""

    __slots__ = ()

    @property
    def is_joined(self) -> bool:
        """Return False."""
        return False

    def begin_step(self, ledger: Ledger) -> None:
        """Nobody to join."""

    def look(self) -> None:
        """Nobody to look for."""

    def announce(self, digest: bytes) -> None:
        """Nobody to tell."""

    def num_holders(self, digest: bytes) -> int:
        """Return 1, this rank."""
        return 1

    def place(self, flat: Tensor, digest: bytes) -> Lease | None:
        """Leave the bytes where they are."""
        return None

    def group_held_bytes(self, held_bytes: int) -> int:
        """Return what this rank holds."""
        return held_bytes
