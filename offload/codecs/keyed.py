"""Rows that are a function of an index list already held: a table of that list's length, and no new list.

Each map of a clustering graph is computed from the one before, row by row, so its rows are a function of the
earlier list although their own distinct rows are fewer. A wrong guess of the key costs time and never a bit:
every row is compared.
"""

import torch
from torch import Tensor

from offload.codecs.base import Block, Codec, Payload
from offload.codecs.distinct import chunk_rows
from offload.codecs.index_list import IndexList, IndexLists
from offload.codecs.table import TablePayload
from offload.same import same_bytes

_NUM_SAMPLED = 64


class Keyed(Codec):
    """A table looked up through a living index list."""

    __slots__ = ()

    name = "keyed"

    def estimate_bytes(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> int | None:
        """Return the bytes of the smallest table whose list agrees with a sample of the block, or None
        without one.
        """
        sizes = [
            width * index.num_distinct
            for width, index in _candidates(block, lists)
            if _is_small(index, width, limit_bytes, block) and _sample_agrees(block, width, index)
        ]
        return min(sizes, default=None)

    def encode(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> Payload | None:
        """Return the first table within `limit_bytes` that reproduces every row through a living list, or
        None.
        """
        for width, index in _candidates(block, lists):
            lanes = block.lanes(width)
            if (
                lanes is None
                or not _is_small(index, width, limit_bytes, block)
                or not _sample_agrees(block, width, index)
            ):
                continue
            table = lanes.index_select(0, index.first)
            if _agrees(lanes, table, index.numbers()):
                return TablePayload(table, index=index)
        return None


def _candidates(block: Block, lists: IndexLists) -> list[tuple[int, IndexList]]:
    if not lists:
        return []
    widths = {block.row_bytes, block.item_bytes}
    return [
        (width, index)
        for width in widths
        for index in lists.keys(block.num_bytes // width, block.flat.device)
    ]


def _is_small(index: IndexList, width_bytes: int, limit_bytes: int, block: Block) -> bool:
    # The list may outlive the payloads it was made for: with it, too, the block must not grow (Law 7).
    table_bytes = width_bytes * index.num_distinct
    return table_bytes <= limit_bytes and table_bytes + index.num_bytes <= max(limit_bytes, block.num_bytes)


def _sample_agrees(block: Block, width_bytes: int, index: IndexList) -> bool:
    lanes = block.lanes(width_bytes)
    if lanes is None:
        return False
    size = min(index.num_rows, _NUM_SAMPLED)
    places = torch.arange(size, device=lanes.device) * (index.num_rows // size)
    theirs = index.first.index_select(0, index.numbers_at(places))
    return same_bytes(lanes.index_select(0, theirs), lanes.index_select(0, places))


def _agrees(lanes: Tensor, table: Tensor, numbers: Tensor) -> bool:
    """Whether `table[numbers]` is `lanes` in every row."""
    step = chunk_rows(lanes)
    chunks = (slice(start, start + step) for start in range(0, len(lanes), step))
    return all(same_bytes(table.index_select(0, numbers[chunk]), lanes[chunk]) for chunk in chunks)
