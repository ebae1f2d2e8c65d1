"""The contract of a sharding policy: bytes that several ranks hold alike, held once for all of them."""

from abc import ABC, abstractmethod

from torch import Tensor

from offload.part import Lease


class Sharding(ABC):
    """Finds what other ranks hold too. No call waits for another rank (Law 6): what is not agreed stays
    local.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def is_joined(self) -> bool:
        """Whether there are other ranks to share with."""

    @abstractmethod
    def look(self) -> None:
        """Join the other ranks, or look who joined since. A no-op with one rank or no process group."""

    @abstractmethod
    def announce(self, digest: bytes) -> None:
        """Tell the other ranks that this one holds bytes with this digest, xxh3-128 of 16 bytes."""

    @abstractmethod
    def num_holders(self, digest: bytes) -> int:
        """Return how many ranks, this one among them, announced these bytes."""

    @abstractmethod
    def place(self, flat: Tensor, *, num_holders: int) -> tuple[Tensor, Lease] | None:
        """Return bytes equal to `flat`, uint8 `[n]`, that other ranks may hold too, and a lease of them; None
        where `flat` had better stay.
        """
