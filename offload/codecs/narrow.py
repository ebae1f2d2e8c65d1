"""Scalars of which some 16-bit parts never vary: those parts are kept once.

A float32 made from a bfloat16 (what a LLaMA's norms save in bf16) has a constant lower half; token numbers in
int64 have three constant quarters. Encoding and decoding are copies, where a table would be a look-up for
each scalar.
"""

import numpy as np
import torch
from torch import Tensor

from offload.codecs.base import Block, Codec, Payload
from offload.codecs.index_list import IndexLists


class Narrow(Codec):
    """The varying 16-bit parts of each scalar, and the constant ones once."""

    __slots__ = ()

    name = "narrow"

    def estimate_bytes(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> int | None:
        """Return the bytes of the parts that vary in a sample, or None when less than half are constant."""
        sample = block.sample(block.item_bytes) if block.item_bytes > 2 else None
        if sample is None:
            return None
        parts = sample.rows.view(np.int16)
        num_varying = int(np.count_nonzero(np.bitwise_or.reduce(parts ^ parts[0], axis=0)))
        payload_bytes = 2 * (num_varying * sample.num_rows + len(parts[0]))
        return payload_bytes if payload_bytes <= limit_bytes else None

    def encode(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> Payload | None:
        """Return the parts that vary anywhere in the block, or None above `limit_bytes`."""
        lanes = block.lanes(block.item_bytes) if block.item_bytes > 2 else None
        if lanes is None:
            return None
        parts = lanes.view(torch.int16)
        first = parts[0].clone()
        varying = [number for number in range(parts.shape[1]) if (parts[:, number] != first[number]).any()]
        payload_bytes = len(varying) * 2 * len(parts) + first.nbytes
        if payload_bytes > limit_bytes:
            return None
        return NarrowPayload(
            {number: parts[:, number].clone() for number in varying}, first=first, num_items=len(parts)
        )


class NarrowPayload(Payload):
    """16-bit parts `[N]` by number, and the value of the others."""

    __slots__ = ("_first", "_num_items", "_varying")

    def __init__(self, varying: dict[int, Tensor], *, first: Tensor, num_items: int) -> None:
        self._varying = varying
        self._first = first
        self._num_items = num_items

    @property
    def num_bytes(self) -> int:
        """Bytes of the parts and of the constant values."""
        return self._first.nbytes + sum(part.nbytes for part in self._varying.values())

    def decode(self) -> Tensor:
        """Write every part to its place."""
        parts = self._first.new_empty(self._num_items, len(self._first))
        for number, value in enumerate(self._first.tolist()):
            parts[:, number] = self._varying.get(number, value)
        return parts.view(-1).view(torch.uint8)
