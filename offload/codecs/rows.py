"""Rows that repeat: a table of the distinct rows and an index of up to 16 bits a row.

The attention map `[N, K]` of a clustered 16-bit weight has at most 65,536 distinct rows, one for each value
of the weight (eDKM's uniquification); the output of an embedding has one for each token in the batch.
"""

from offload.codecs.base import Block, Codec, Payload
from offload.codecs.index_list import IndexLists
from offload.codecs.table import encode_table, estimate_table


class Rows(Codec):
    """A table of the distinct rows."""

    __slots__ = ()

    name = "rows"

    def estimate_bytes(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> int | None:
        """Return about how many bytes the table and its index take, or None for a block without rows."""
        if block.row_items == 1:
            return None
        return estimate_table(block, block.row_bytes, limit_bytes=limit_bytes)

    def encode(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> Payload | None:
        """Return the table and its index, or None above 65,536 distinct rows or `limit_bytes`."""
        return encode_table(block, block.row_bytes, limit_bytes=limit_bytes, lists=lists)
