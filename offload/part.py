"""Bytes that a payload holds: the store's own, or in memory that several ranks share."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from offload.stats import Ledger


class Lease(ABC):
    """One rank's hold of shared bytes; its end gives them up."""

    __slots__ = ("digest", "num_holders")

    def __init__(self, digest: bytes, *, num_holders: int) -> None:
        self.digest = digest
        """xxh3-128 of the bytes."""
        self.num_holders = num_holders
        """Ranks that hold them, each of which counts an equal share."""

    @abstractmethod
    def check(self, shared: Tensor) -> None:
        """Raise RankMismatchError if `shared`, uint8 `[n]`, is not what the ranks agreed on."""


Place = Callable[[Tensor], tuple[Tensor, Lease] | None]
"""From uint8 `[n]` to equal bytes in shared memory and the lease of them; None where there are none yet."""


class Part:
    """One tensor of a payload. Owns it, or a lease of equal bytes that other ranks read too; with a ledger
    also the charge, otherwise its owner charges `num_bytes`.
    """

    __slots__ = ("_charge", "_lease", "_ledger", "_tensor")

    def __init__(self, tensor: Tensor, *, lease: Lease | None = None, ledger: Ledger | None = None) -> None:
        self._tensor = tensor
        self._lease = lease
        self._ledger = ledger
        self._charge = ledger.charge(tensor.nbytes) if ledger is not None else None

    @property
    def device(self) -> torch.device:
        """Where the bytes lie."""
        return self._tensor.device

    @property
    def is_shared(self) -> bool:
        """Whether other ranks may read the same bytes."""
        return self._lease is not None

    @property
    def num_bytes(self) -> int:
        """Bytes that this rank holds for it: all, or its share."""
        return (
            self._tensor.nbytes if self._lease is None else -(-self._tensor.nbytes // self._lease.num_holders)
        )

    def __len__(self) -> int:
        return len(self._tensor)

    def read(self) -> Tensor:
        """Return the tensor, to be read only; raises RankMismatchError when shared bytes were changed."""
        if self._lease is not None:
            self._lease.check(self._tensor.view(-1).view(torch.uint8))
        return self._tensor

    def share(self, place: Place) -> bool:
        """Give up the bytes for shared ones where there are some; return whether they are shared now."""
        if self._lease is None:
            flat = self._tensor.view(-1).view(torch.uint8)
            placed = place(flat)
            if placed is not None:
                shared, self._lease = placed
                self._tensor = shared.view(self._tensor.dtype).view(self._tensor.shape)
                self._recharge()
        return self.is_shared

    def count_holders(self, num_holders: int) -> None:
        """Take note of how many ranks hold the bytes, if they are shared."""
        if self._lease is not None:
            self._lease.num_holders = num_holders
            self._recharge()

    def _recharge(self) -> None:
        if self._ledger is not None:
            self._charge = self._ledger.charge(self.num_bytes)
