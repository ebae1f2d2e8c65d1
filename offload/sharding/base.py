"""The contract of a sharding policy: bytes that several ranks hold alike, held once for all of them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from offload.ledger import Ledger
from offload.part import Lease

MIN_BYTES = 4096
"""Fewer bytes stay with their rank, unannounced, as do those on other devices than the CPU."""


@dataclass(frozen=True)
class Traffic:
    """What came from other ranks since the outermost enter.

    Arguments:
        gathered_bytes: that other ranks sent.
        waited_seconds: for other ranks.
    """

    gathered_bytes: int = 0
    waited_seconds: float = 0.0


class Sharding(ABC):
    """Finds what other ranks hold too. No call made in forward waits for another rank (Law 6): what is not
    agreed stays local.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def is_joined(self) -> bool:
        """Whether there are other ranks to share with."""

    @abstractmethod
    def begin_step(self, ledger: Ledger) -> None:
        """Join the other ranks, at a store's outermost enter. A no-op with one rank or no process group.

        Args:
            ledger: charged for bytes that the policy itself comes to hold.
        """

    def begin_stretch(self, *, step: int, stretch: int) -> None:  # noqa: B027 - most have no use for it
        """Take note that something is saved for the first time since the outermost enter, or since something
        was unpacked.

        Args:
            step: counts the outermost enters of the store in which something was saved, from 1.
            stretch: counts the stretches of the step, from 1. Ranks that enter equally often and run the same
                backwards count alike, whatever they save.
        """

    @abstractmethod
    def look(self) -> None:
        """Tell what was announced, and see what others announced. Does not wait for them."""

    @abstractmethod
    def announce(self, digest: bytes) -> None:
        """Take note that this rank holds a part whose bytes have this digest, xxh3-128 of 16 bytes."""

    @abstractmethod
    def num_holders(self, digest: bytes) -> int:
        """Return how many ranks, this one among them, are known to hold these bytes."""

    @abstractmethod
    def place(self, flat: Tensor, digest: bytes) -> Lease | None:
        """Return a lease of bytes equal to `flat`, uint8 `[n]`, whose digest is `digest`; None where `flat`
        had better stay.
        """

    @abstractmethod
    def group_held_bytes(self, held_bytes: int) -> int:
        """Tell what this rank holds, and return what all are known to hold together."""

    @property
    def is_near(self) -> bool:
        """Whether what it places is read without another rank."""
        return True

    def close(self, *, patiently: bool) -> bool:
        """Take note that something is unpacked, or that the step is over; return whether what is agreed may
        have changed by that. Where `patiently`, it may wait for other ranks.
        """
        return False

    def begin_serving(self) -> None:  # noqa: B027
        """Take note that what is agreed has been placed, after `close`."""

    @property
    def traffic(self) -> Traffic:
        """What came from other ranks since `begin_step`."""
        return Traffic()
