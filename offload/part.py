"""Bytes that a payload holds: the store's own, or leased from what several ranks hold together."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from offload.digest import digest_of_bytes
from offload.ledger import Ledger


class Lease(ABC):
    """One rank's hold of bytes that other ranks hold too; its end gives them up."""

    __slots__ = ()

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes that this rank counts as held for it."""

    @property
    @abstractmethod
    def is_near(self) -> bool:
        """Whether reading needs no other rank."""

    @abstractmethod
    def count_holders(self, num_holders: int) -> bool:
        """Take note of how many ranks hold the bytes; return whether `num_bytes` changed."""

    @abstractmethod
    def read(self) -> Tensor:
        """Return the bytes, uint8 `[n]`, to be read only; raises RankMismatchError if they are not what the
        ranks agreed on.
        """

    @abstractmethod
    def read_own(self) -> Tensor:
        """Return the bytes as `read` does, the caller's to keep and to write to."""


Place = Callable[[Tensor, bytes], Lease | None]
"""From uint8 `[n]` and its digest to a lease of equal bytes; None where there is none yet."""


class Part:
    """One tensor of a payload. Owns it, or a lease of equal bytes; with a ledger also the charge, otherwise
    its owner charges `num_bytes`. `digest` is that of its bytes, where it is known.
    """

    __slots__ = ("_charge", "_digest", "_dtype", "_lease", "_ledger", "_shape", "_tensor", "device")

    def __init__(self, tensor: Tensor, *, ledger: Ledger | None = None, digest: bytes | None = None) -> None:
        self._tensor: Tensor | None = tensor
        self._lease: Lease | None = None
        self._digest = digest
        self._dtype = tensor.dtype
        self._shape = tensor.shape
        self.device = tensor.device
        self._ledger = ledger
        self._charge = ledger.charge(tensor.nbytes) if ledger is not None else None

    @property
    def is_key(self) -> bool:
        """Whether payloads to come may be encoded by it: it is charged where it is kept."""
        return self._ledger is not None

    @property
    def is_near(self) -> bool:
        """Whether reading needs no other rank."""
        return self._lease is None or self._lease.is_near

    @property
    def num_bytes(self) -> int:
        """Bytes that this rank holds for it: all, or its share."""
        return self._lease.num_bytes if self._lease is not None else self.num_all_bytes

    @property
    def num_all_bytes(self) -> int:
        """Bytes of the tensor, wherever they lie."""
        return self._shape.numel() * self._dtype.itemsize

    @property
    def digest(self) -> bytes:
        """xxh3-128 of its bytes."""
        if self._digest is None:
            self._digest = digest_of_bytes(self._flat().cpu())
        return self._digest

    def __len__(self) -> int:
        return self._shape[0]

    def read(self) -> Tensor:
        """Return the tensor, to be read only; raises RankMismatchError when ranks no longer agree on it."""
        if self._tensor is not None:
            return self._tensor
        assert self._lease is not None
        return self._lease.read().view(self._dtype).view(self._shape)

    def read_own(self) -> Tensor:
        """Return the tensor as `read` does, the caller's to keep and to write to."""
        if self._tensor is not None:
            return self._tensor.clone()
        assert self._lease is not None
        return self._lease.read_own().view(self._dtype).view(self._shape)

    def lend(self) -> Tensor:
        """Return the tensor to a reader that only reads it: as `read_own` does where the bytes are leased."""
        return self._tensor if self._tensor is not None else self.read_own()

    @property
    def is_shared(self) -> bool:
        """Whether other ranks may hold the bytes too."""
        return self._lease is not None

    def share(self, place: Place, *, num_holders: int) -> bool:
        """Give up the bytes for leased ones where there are some, and take note of how many ranks hold them;
        return whether `num_bytes` may have changed.
        """
        was_shared = self.is_shared
        if self._lease is None:
            self._lease = place(self._flat(), self.digest)
        if self._lease is None:
            return False
        self._tensor = None
        changed = self._lease.count_holders(num_holders) or not was_shared
        if changed and self._ledger is not None:
            self._charge = self._ledger.charge(self.num_bytes)
        return changed

    def _flat(self) -> Tensor:
        assert self._tensor is not None
        return self._tensor.reshape(-1).view(torch.uint8)
