"""A table of distinct rows and a list that says which stands where: what bits, rows and keyed make."""

import torch
from torch import Tensor

from offload.codecs.base import Block, Payload
from offload.codecs.distinct import Sample, draw_sample, number_rows
from offload.codecs.index_list import IndexList, IndexLists, list_bytes
from offload.part import Part


class TablePayload(Payload):
    """A table of distinct rows, `[R, L]`, owned here, and an index list, shared."""

    __slots__ = ("_index", "_table")

    def __init__(self, table: Tensor, *, index: IndexList) -> None:
        self._table = Part(table)
        self._index = index

    @property
    def num_bytes(self) -> int:
        """Bytes of the table; the list is charged where it is kept."""
        return self._table.num_bytes

    @property
    def parts(self) -> tuple[Part, ...]:
        """The table, and the list's."""
        return (self._table, *self._index.parts)

    def decode(self) -> Tensor:
        """Look every row up."""
        return self._table.read().index_select(0, self._index.numbers()).view(-1).view(torch.uint8)


def estimate_table(block: Block, width_bytes: int, *, limit_bytes: int) -> int | None:
    """Return about how many bytes a table of `width_bytes` rows and its list take, or None when a sample says
    more than the limit.
    """
    sample = block.sample(width_bytes)
    size_bytes = _size_bytes(sample, width_bytes) if sample is not None else None
    if sample is None or size_bytes is None or size_bytes > limit_bytes:
        return None
    if len(sample.rows) < sample.num_rows and (lanes := block.lanes(width_bytes)) is not None:
        # Neighbours may repeat where the block does not: what passes is asked again without them.
        spread = draw_sample(lanes, limit=sample.limit, factor=4, run_bytes=1)
        size_bytes = _size_bytes(spread, width_bytes)
    return size_bytes if size_bytes is not None and size_bytes <= limit_bytes else None


def _size_bytes(sample: Sample, width_bytes: int) -> int | None:
    num_distinct = sample.num_distinct()
    if num_distinct is None:
        return None
    return num_distinct * width_bytes + list_bytes(sample.num_rows, num_distinct)


def encode_table(block: Block, width_bytes: int, *, limit_bytes: int, lists: IndexLists) -> Payload | None:
    """Return the block as a table of `width_bytes` rows and an index list, or None when that takes more than
    `limit_bytes`.
    """
    lanes = block.lanes(width_bytes)
    if lanes is None:
        return None
    found = number_rows(lanes, limit=block.most_distinct(width_bytes, limit_bytes=limit_bytes))
    if found is None:
        return None
    table, index, first = found
    if table.nbytes + list_bytes(len(lanes), len(first)) > limit_bytes:
        return None
    return TablePayload(table, index=lists.keep(index, first=first))
