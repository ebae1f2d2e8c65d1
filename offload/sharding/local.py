"""Every rank for itself."""

from torch import Tensor

from offload.part import Lease
from offload.sharding.base import Sharding


class Local(Sharding):
    """Shares nothing."""

    __slots__ = ()

    @property
    def is_joined(self) -> bool:
        """Return False."""
        return False

    def look(self) -> None:
        """Nothing to join."""

    def announce(self, digest: bytes) -> None:
        """Nobody to tell."""

    def num_holders(self, digest: bytes) -> int:
        """Return 1, this rank."""
        return 1

    def place(self, flat: Tensor, *, num_holders: int) -> tuple[Tensor, Lease] | None:
        """Leave the bytes where they are."""
        return None
