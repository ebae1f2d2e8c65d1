"""Scalars with few distinct bit patterns: a table of patterns and an index of 0 to 16 bits a scalar.

A mask takes 1 bit a scalar whatever its dtype, one value everywhere takes none. Patterns are compared as
bits, never as numbers, so -0.0 and the payloads of NaN come back.
"""

from offload.codecs.base import Block, Codec, Payload
from offload.codecs.index_list import IndexLists
from offload.codecs.table import encode_table, estimate_table


class Bits(Codec):
    """A table of the distinct scalars."""

    __slots__ = ()

    name = "bits"

    def estimate_bytes(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> int | None:
        """Return about how many bytes the table and its index take."""
        return estimate_table(block, block.item_bytes, limit_bytes=limit_bytes)

    def encode(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> Payload | None:
        """Return the table and its index, or None above 65,536 patterns or `limit_bytes`."""
        return encode_table(block, block.item_bytes, limit_bytes=limit_bytes, lists=lists)
