"""A table of distinct rows and a list that says which stands where: what bits, rows and keyed make."""

import torch
from torch import Tensor

from offload.codecs.base import Block, Payload
from offload.codecs.distinct import estimate_distinct, number_rows, sample_rows
from offload.codecs.index_list import IndexList, IndexLists, list_bytes


class TablePayload(Payload):
    """A table of distinct rows, `[R, L]`, owned here, and an index list, shared."""

    __slots__ = ("_index", "_table")

    def __init__(self, table: Tensor, *, index: IndexList) -> None:
        self._table = table
        self._index = index

    @property
    def num_bytes(self) -> int:
        """Bytes of the table; the list is charged where it is kept."""
        return self._table.nbytes

    def decode(self) -> Tensor:
        """Look every row up."""
        return self._table.index_select(0, self._index.numbers()).view(-1).view(torch.uint8)


def estimate_table(block: Block, width_bytes: int, *, limit_bytes: int) -> int | None:
    """Return about how many bytes a table of `width_bytes` rows and its list take, or None when a sample says
    more than the limit.
    """
    sample, lanes = block.sample(width_bytes), block.lanes(width_bytes)
    if sample is None or lanes is None:
        return None
    num_rows = block.num_bytes // width_bytes
    limit = block.most_distinct(width_bytes, limit_bytes=limit_bytes)
    num_distinct = estimate_distinct(sample, num_rows=num_rows, limit=limit)
    if num_distinct is not None and len(sample) < num_rows:
        # Neighbours may repeat where the block does not: what passes is asked again without them.
        spread = sample_rows(lanes, size=min(num_rows, 4 * len(sample)), run_bytes=1)
        num_distinct = estimate_distinct(spread, num_rows=num_rows, limit=limit)
    return None if num_distinct is None else num_distinct * width_bytes + list_bytes(num_rows, num_distinct)


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
