"""Rows that are a function of an index list already held: a table of that list's length, and no new list.

Each map of a clustering graph is computed from the one before, row by row, so its rows are a function of the earlier list although
their own distinct rows are fewer. A wrong guess of the key costs time and never a bit: every row is compared.
"""

import torch
from torch import Tensor

from offload.codecs.base import Block, Codec, Payload
from offload.codecs.distinct import chunk_rows, sample_places
from offload.codecs.index_list import IndexList, IndexLists
from offload.codecs.table import TablePayload

_SAMPLE_ROWS = 1024


class Keyed(Codec):
    """A table looked up through a living index list."""

    __slots__ = ()

    name = "keyed"

    def estimate_bytes(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> int | None:
        """Return the bytes of the smallest table that a living list of the right length would need, or None without one."""
        sizes = [width_bytes * len(index.first) for width_bytes, index in _candidates(block, lists)]
        return min(sizes, default=None)

    def encode(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> Payload | None:
        """Return the first table within `limit_bytes` that reproduces every row through a living list, or None."""
        for width_bytes, index in _candidates(block, lists):
            lanes = block.lanes(width_bytes)
            if lanes is None or width_bytes * len(index.first) > limit_bytes:
                continue
            table = lanes.index_select(0, index.first)
            if _agrees(lanes, table, index.numbers()):
                return TablePayload(table, index=index)
        return None


def _candidates(block: Block, lists: IndexLists) -> list[tuple[int, IndexList]]:
    widths = {block.row_bytes, block.item_bytes}
    return [(width, index) for width in widths for index in lists.keys(block.num_bytes // width, block.flat.device)]


def _agrees(lanes: Tensor, table: Tensor, numbers: Tensor) -> bool:
    """Whether `table[numbers]` is `lanes` in every row; a sample is asked first, so a wrong key costs little."""
    places = sample_places(lanes.shape[0], min(lanes.shape[0], _SAMPLE_ROWS), lanes.device)
    if not _same(lanes.index_select(0, places), table, numbers.index_select(0, places)):
        return False
    step = chunk_rows(lanes)
    starts = range(0, lanes.shape[0], step)
    return all(_same(lanes[start : start + step], table, numbers[start : start + step]) for start in starts)


def _same(lanes: Tensor, table: Tensor, numbers: Tensor) -> bool:
    return torch.equal(table.index_select(0, numbers), lanes)
