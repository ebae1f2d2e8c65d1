"""The contract of a codec: bytes in, a smaller payload out, and the same bytes back."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from offload.codecs.distinct import Sample, draw_sample
from offload.codecs.index_list import IndexLists
from offload.part import Part

_LANES: Mapping[int, torch.dtype] = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


@dataclass(frozen=True)
class Block:
    """The bytes to encode, as they lie on their storage.

    `flat` is uint8 `[num_bytes]` and belongs to the saved tensor: a payload must not keep it. A scalar is
    `item_bytes` wide, a row `row_items` scalars.
    """

    flat: Tensor
    item_bytes: int
    row_items: int
    _samples: dict[int, Sample] = field(default_factory=dict, repr=False)

    @property
    def num_bytes(self) -> int:
        """Bytes of the block."""
        return self.flat.numel()

    @property
    def limit_bytes(self) -> int:
        """The most bytes a payload may have to be worth its time: half, and an eighth of that for tables."""
        return self.num_bytes * 9 // 16

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.item_bytes * self.row_items

    def lanes(self, width_bytes: int) -> Tensor | None:
        """Return the block as integers `[num_bytes / width_bytes, L]`, a row for each `width_bytes`, or None
        if they do not divide.
        """
        if self.num_bytes == 0 or self.num_bytes % width_bytes:
            return None
        aligned = width_bytes | int(self.flat.storage_offset())
        lane_bytes = next(size for size in _LANES if aligned % size == 0)
        return self.flat.view(_LANES[lane_bytes]).view(-1, width_bytes // lane_bytes)

    def sample(self, width_bytes: int) -> Sample | None:
        """Return some rows of `lanes(width_bytes)`; drawn once, whoever asks."""
        if width_bytes not in self._samples:
            lanes = self.lanes(width_bytes)
            if lanes is None:
                return None
            limit = self.most_distinct(width_bytes, limit_bytes=self.limit_bytes)
            self._samples[width_bytes] = draw_sample(lanes, limit=limit)
        return self._samples[width_bytes]

    def most_distinct(self, width_bytes: int, *, limit_bytes: int) -> int:
        """Return how many distinct rows of `width_bytes` at most a table and its index list can hold in
        `limit_bytes`.
        """
        num_rows = self.num_bytes // width_bytes
        room = 0
        for bits in range(min(16, num_rows.bit_length(), 8 * limit_bytes // num_rows), -1, -1):
            more_room = (limit_bytes - num_rows * bits // 8) // (width_bytes + 4)
            if more_room >= 1 << bits:
                return min(num_rows, max(room, 1 << bits))
            room = more_room
        return 0


class Payload(ABC):
    """Encoded bytes. Owned by one entry's content; its end frees them."""

    __slots__ = ()

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes that this payload owns alone: tables, indices, headers, padding (Law 7)."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """The tensors that may be shared with other ranks that hold them too; none for a payload that keeps
        its bytes to itself.
        """
        return ()

    @property
    def is_fresh(self) -> bool:
        """Whether all is there that `decode` needs; False once something that it does not own was changed."""
        return True

    @abstractmethod
    def decode(self) -> Tensor:
        """Return the block's bytes, uint8 `[num_bytes]`, in a storage of their own; any number of times (Law
        3). Raises StaleTensorError unless `is_fresh`.
        """

    @property
    def can_lend(self) -> bool:
        """Whether the block is there as it is, so that `lend` need not copy it."""
        return False

    def lend(self) -> Tensor:
        """Return what `decode` does, to be read only."""
        return self.decode()


class Codec(ABC):
    """A lossless way to hold a block in fewer bytes. Stateless: what codecs share lives in the store's index
    lists.
    """

    __slots__ = ()

    name: str

    @abstractmethod
    def estimate_bytes(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> int | None:
        """Return about how many bytes the payload would take, from a sample, or None when it looks more than
        `limit_bytes`.
        """

    @abstractmethod
    def encode(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> Payload | None:
        """Return the payload, or None when it cannot be had within `limit_bytes`."""
