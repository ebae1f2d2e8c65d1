"""Scalars that a cast to a smaller dtype and back reproduces: kept in the smaller one.

What a LLaMA's norms save in bf16 and under autocast is a float32 made from a bfloat16; token numbers in int64
fit into 16 bits. A cast is several times quicker than a look-up in a table for each scalar.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from offload.codecs.base import Block, Codec, Payload
from offload.codecs.halves import upper_halves
from offload.codecs.index_list import IndexLists
from offload.part import Part
from offload.same import same_bytes

_CASTS: Mapping[int, tuple[tuple[torch.dtype, torch.dtype], ...]] = {
    # Not float64 in float32: how a subnormal is read depends on the reading thread's set_flush_denormal.
    8: ((torch.int64, torch.uint16), (torch.int64, torch.int32)),
    4: ((torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.int32, torch.uint16)),
}


_NUM_TRIED = 64
_INTEGERS: Mapping[int, torch.dtype] = {8: torch.int64, 4: torch.int32}


class Cast(Codec):
    """The block in a dtype of half the size or less, if that loses no bit."""

    __slots__ = ()

    name = "cast"

    def estimate_bytes(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> int | None:
        """Return the bytes in the first dtype that reproduces a sample, or None."""
        sample = block.sample(block.item_bytes) if block.item_bytes >= 4 else None
        if sample is None:
            return None
        rows = torch.from_numpy(sample.rows[:_NUM_TRIED])
        for wide, narrow in _casts(block):
            num_bytes = block.num_bytes * narrow.itemsize // wide.itemsize
            if num_bytes <= limit_bytes and _cast(rows, wide, narrow) is not None:
                return num_bytes
        return None

    def encode(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> Payload | None:
        """Return the block in the first dtype that reproduces all of it, or None above `limit_bytes`."""
        for wide, narrow in _casts(block):
            lanes = block.lanes(wide.itemsize)
            if lanes is None or block.num_bytes * narrow.itemsize // wide.itemsize > limit_bytes:
                continue
            small = _cast(lanes, wide, narrow)
            if small is not None:
                return CastPayload(small.view(-1), wide)
        return None


class CastPayload(Payload):
    """The scalars in the smaller dtype."""

    __slots__ = ("_small", "_wide")

    def __init__(self, small: Tensor, wide: torch.dtype) -> None:
        self._small = Part(small)
        self._wide = wide

    @property
    def num_bytes(self) -> int:
        """Bytes of the smaller scalars."""
        return self._small.num_bytes

    @property
    def parts(self) -> tuple[Part, ...]:
        """The smaller scalars."""
        return (self._small,)

    def decode(self) -> Tensor:
        """Cast them back."""
        return self._small.read().to(self._wide).view(torch.uint8)


def _casts(block: Block) -> Iterator[tuple[torch.dtype, torch.dtype]]:
    for item_bytes, casts in _CASTS.items():
        if block.item_bytes % item_bytes == 0:
            yield from casts


def _cast(lanes: Tensor, wide: torch.dtype, narrow: torch.dtype) -> Tensor | None:
    """Return `lanes`, integers `[N, L]`, taken for `wide` and cast to `narrow`, or None if a bit would be
    lost.
    """
    if lanes.element_size() != wide.itemsize:
        lanes = lanes.view(_INTEGERS[wide.itemsize])
    # Memory of numpy's may lie at an odd address, where C may not read whole scalars.
    is_near = lanes.device.type == "cpu" and lanes.data_ptr() % lanes.element_size() == 0
    if narrow == torch.bfloat16 and upper_halves is not None and is_near:
        small = torch.empty(lanes.shape, dtype=narrow, device=lanes.device)
        return small if upper_halves(lanes.data_ptr(), small.data_ptr(), small.numel()) else None
    small = lanes.view(wide).to(narrow)
    return small if same_bytes(small.to(wide).view(lanes.dtype), lanes) else None
