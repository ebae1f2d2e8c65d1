"""16-bit tensors that serve as index lists where they lie: a row's number is the bit pattern of its element.

A key is not the store's own. Whoever holds a table by it holds what autograd keeps of it, and the hash of its
bytes, which is asked again before the table is read (Law 4): fused optimizers and the refills of FSDP move no
version counter.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from offload.digest import digest_of_bytes
from offload.errors import StaleTensorError
from offload.ledger import Ledger

_NUM_PATTERNS = 1 << 16
_CHUNK_ITEMS = 1 << 17


class Keeper(Protocol):
    """What autograd keeps for a save."""

    def open(self) -> Tensor:
        """Return the saved tensor, or raise StaleTensorError."""


class Reading(NamedTuple):
    """A 16-bit tensor's shape and dtype, the order in which its elements are taken, as a permutation of its
    dims, and where on the storage they end, in bytes.
    """

    shape: torch.Size
    dtype: torch.dtype
    order: tuple[int, ...]
    stop_bytes: int

    def flat(self, keeper: Keeper) -> Tensor:
        """Return the elements, int16 `[N]`, a view where they lie in that order; raises StaleTensorError."""
        flat = self._opened(keeper).permute(self.order).reshape(-1).view(torch.int16)
        # One value expanded is still a view, of stride 0.
        return flat if flat.stride() == (1,) else flat.clone(memory_format=torch.contiguous_format)

    def at(self, keeper: Keeper, places: Tensor) -> Tensor:
        """Return those at `places`, int64 `[S]`, as int16 `[S]`; raises StaleTensorError."""
        tensor = self._opened(keeper).permute(self.order)
        found: Tensor = tensor[torch.unravel_index(places, tensor.shape)] if tensor.ndim else tensor.view(1)
        return found.view(torch.int16)

    def _opened(self, keeper: Keeper) -> Tensor:
        tensor = keeper.open()
        num_bytes = tensor.untyped_storage().nbytes()
        if num_bytes < self.stop_bytes:
            raise StaleTensorError(f"its storage has {num_bytes} bytes and had {self.stop_bytes} or more")
        return tensor


class Key:
    """A 16-bit tensor of N elements as it was when it became a key; R of the 65,536 bit patterns occur.

    Owned by the payloads that are tables by it, with its charge. `patterns` are those that occur, int16
    `[R]`, and `first` is where each stands, int32 `[R]`.
    """

    __slots__ = ("__weakref__", "_charge", "_keeper", "_reading", "digest", "first", "patterns")

    def __init__(
        self, keeper: Keeper, reading: Reading, *, flat: Tensor, digest: bytes, ledger: Ledger
    ) -> None:
        self._keeper = keeper
        self._reading = reading
        self.digest = digest
        self.patterns, self.first = _first_places(flat)
        self._charge = ledger.charge(self.patterns.nbytes + self.first.nbytes)

    @property
    def num_bytes(self) -> int:
        """Bytes of `patterns` and `first`."""
        return self.patterns.nbytes + self.first.nbytes

    def read(self) -> Tensor:
        """Return the tensor's elements, int16 `[N]`, to be read only; raises StaleTensorError when they are
        no longer what they were.
        """
        try:
            flat = self._reading.flat(self._keeper)
        except StaleTensorError as error:
            raise StaleTensorError(f"{self._describe()}, which cannot be had: {error}") from error
        if digest_of(flat) != self.digest:
            raise StaleTensorError(
                f"{self._describe()}, whose bytes are others now than in forward. Move the change (an "
                "optimizer step, an in-place operation) behind backward."
            )
        return flat

    def numbers(self, flat: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield chunks of the tensor and, for each element of `flat` there, the number of its pattern among
        `patterns`, int32 `[n]`; any number for one that did not occur.
        """
        number = torch.zeros(_NUM_PATTERNS, dtype=torch.int32, device=flat.device)
        number[_unsigned(self.patterns).long()] = torch.arange(
            len(self.patterns), dtype=torch.int32, device=flat.device
        )
        for start in range(0, len(flat), _CHUNK_ITEMS):
            chunk = slice(start, start + _CHUNK_ITEMS)
            yield chunk, number.index_select(0, _unsigned(flat[chunk]))

    def _describe(self) -> str:
        return (
            "backward needs a saved tensor that is held as a table keyed by another one, of shape "
            f"{tuple(self._reading.shape)}, {self._reading.dtype}"
        )


def digest_of(flat: Tensor) -> bytes:
    """Return the xxh3-128 digest of a contiguous tensor, 16 bytes."""
    return digest_of_bytes(flat.view(torch.uint8).cpu())


def _unsigned(flat: Tensor) -> Tensor:
    return flat.view(torch.uint16).to(torch.int32)


def _first_places(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Return the patterns that occur in `flat`, int16 `[N]`, as int16 `[R]`, and the first place of each,
    int32 `[R]`.
    """
    nowhere = len(flat)
    place = torch.full((_NUM_PATTERNS,), nowhere, dtype=torch.int32, device=flat.device)
    for start in range(0, len(flat), _CHUNK_ITEMS):
        numbers = _unsigned(flat[start : start + _CHUNK_ITEMS])
        new = (place.index_select(0, numbers) == nowhere).nonzero().squeeze(1)
        if new.numel():
            place.scatter_reduce_(0, numbers[new].long(), (new + start).to(torch.int32), "amin")
    patterns = (place != nowhere).nonzero().squeeze(1)
    return patterns.to(torch.int32).to(torch.uint16).view(torch.int16), place[patterns]
