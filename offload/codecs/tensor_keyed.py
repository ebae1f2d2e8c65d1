"""Rows that are a function of a saved 16-bit tensor: a table, and a reference to that tensor as its list.

Each map of a clustered bf16 weight is computed from the weight row by row, and so is the clustered weight
that its layer saves. The weight is alive anyway, so they take a row for each of its bit patterns and nothing
that grows with it. A wrong guess of the key costs time and never a bit: every row is compared, and the few
that differ, as where a kernel treats the end of a tensor otherwise, are kept beside the table.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from offload.codecs.base import Block, Codec, Payload
from offload.codecs.candidates import Candidate
from offload.codecs.distinct import Sample
from offload.codecs.index_list import IndexLists
from offload.codecs.key import Key, digest_of
from offload.errors import StoreError
from offload.part import Part
from offload.same import same_bytes

_NUM_SAMPLED = (255, 4095)
"""Few tell most wrong keys; odd, so that the places do not keep time with powers of two."""
_MOST_ODD = 1 / 1024
"""Of all rows, those that may differ from the table."""
_KEY_BYTES = 6
"""Held for each distinct element of a key: its pattern and its place."""


class TensorKeyed(Codec):
    """A table looked up by the bit patterns of a tensor that is saved, too."""

    __slots__ = ()

    name = "tensor-keyed"

    def estimate_bytes(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> int | None:
        """Return about how many bytes the smallest table takes whose key agrees with a sample of the block,
        with those of a key that is no parameter; None without one.
        """
        sizes = (
            _table_bytes(num_distinct, width) + candidate.kept_bytes
            for width, candidate, num_distinct in _agreeing(block, lists)
            if _is_small(num_distinct, width, candidate, limit_bytes=limit_bytes, block=block)
        )
        return min((size for size in sizes if size <= limit_bytes), default=None)

    def encode(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> Payload | None:
        """Return the first table within `limit_bytes` that reproduces the rows by a saved tensor, or None."""
        for width, candidate, _ in _agreeing(block, lists):
            lanes, found = block.lanes(width), candidate.key()
            if lanes is None or found is None:
                continue
            key, flat = found
            if not _is_small(len(key.first), width, candidate, limit_bytes=limit_bytes, block=block):
                continue
            payload = _encode(lanes, key, flat)
            if payload is not None and payload.num_bytes + key.num_bytes <= limit_bytes:
                return payload
        return None


class TensorKeyedPayload(Payload):
    """A table `[R, L]` for the R patterns of a key of N elements, and the rows `[M, L]` at M places that
    differ from it; owned here. The key is shared.
    """

    __slots__ = ("_key", "_odd_places", "_odd_rows", "_table")

    def __init__(self, table: Tensor, *, key: Key, odd_places: Tensor, odd_rows: Tensor) -> None:
        self._table = Part(table)
        self._key = key
        self._odd_places = odd_places
        self._odd_rows = odd_rows

    @property
    def num_bytes(self) -> int:
        """Bytes of the table and of what differs; the key is charged where it is kept."""
        return self._table.num_bytes + self._odd_places.nbytes + self._odd_rows.nbytes

    @property
    def parts(self) -> tuple[Part, ...]:
        """The table. Each rank has the key as its own."""
        return (self._table,)

    @property
    def is_fresh(self) -> bool:
        """Whether the key is what it was."""
        try:
            self._key.read()
        except StoreError:
            return False
        return True

    def decode(self) -> Tensor:
        """Look every row up; raises StaleTensorError when the key changed."""
        flat = self._key.read()
        table = self._table.read()
        rows = table.new_empty(len(flat), *table.shape[1:])
        for chunk, numbers in self._key.numbers(flat):
            torch.index_select(table, 0, numbers, out=rows[chunk])
        rows[self._odd_places.long()] = self._odd_rows
        return rows.view(-1).view(torch.uint8)


def _agreeing(block: Block, lists: IndexLists) -> Iterator[tuple[int, Candidate, int]]:
    """Yield widths of rows, keys that agree with a sample of the block, and about how many distinct elements
    they have.
    """
    for width in dict.fromkeys((block.row_bytes, block.item_bytes)):
        lanes = block.lanes(width)
        for candidate in lists.tensors.of(block.num_bytes // width, block.flat.device):
            num_distinct = _sample(lanes, candidate) if lanes is not None else None
            if num_distinct is not None:
                yield width, candidate, num_distinct


def _sample(lanes: Tensor, candidate: Candidate) -> int | None:
    """Estimate the distinct elements of the key; None when some have no equal in the sample, or where rows
    differ at equal elements.
    """
    few, many = _NUM_SAMPLED
    if _sorted_patterns(lanes, candidate, num_sampled=few) is None:
        return None
    patterns = _sorted_patterns(lanes, candidate, num_sampled=many)
    if patterns is None:
        return None
    return Sample(patterns.view(-1, 1).cpu().numpy(), len(lanes), 1 << 16).num_distinct()


def _sorted_patterns(lanes: Tensor, candidate: Candidate, *, num_sampled: int) -> Tensor | None:
    """Return a sample of the key's elements, sorted; None where rows differ at equal elements."""
    size = min(len(lanes), num_sampled)
    places = torch.arange(size, device=lanes.device) * (len(lanes) // size)
    patterns = candidate.at(places)
    if patterns is None:
        return None
    patterns, order = patterns.sort()
    rows = lanes.index_select(0, places[order])
    same = patterns[1:] == patterns[:-1]
    odd = (rows[1:] != rows[:-1]).any(1) & same
    return None if int(odd.sum()) > max(1, 4 * _MOST_ODD * size) else patterns


def _is_small(
    num_distinct: int, width_bytes: int, candidate: Candidate, *, limit_bytes: int, block: Block
) -> bool:
    # The key may outlive what else holds it: with it, too, the block must not grow (Law 7).
    table_bytes = _table_bytes(num_distinct, width_bytes)
    most_bytes = max(limit_bytes, block.num_bytes)
    return table_bytes <= limit_bytes and table_bytes + candidate.kept_bytes <= most_bytes


def _table_bytes(num_distinct: int, width_bytes: int) -> int:
    return num_distinct * (width_bytes + _KEY_BYTES)


def _encode(lanes: Tensor, key: Key, flat: Tensor) -> TensorKeyedPayload | None:
    """Return `lanes` as a table by `flat`, int16 `[N]`, or None if it is no function of that or that is
    written to meanwhile.
    """
    rows = lanes.view(-1) if lanes.shape[1] == 1 else lanes
    table = rows.index_select(0, key.first)
    odd = [torch.empty(0, dtype=torch.int32, device=lanes.device)]
    num_odd, most_odd = 0, int(_MOST_ODD * len(rows))
    for chunk, numbers in key.numbers(flat):
        theirs = table.index_select(0, numbers)
        if same_bytes(theirs, rows[chunk]):
            continue
        differs = (theirs != rows[chunk]).view(len(theirs), -1).any(1).nonzero().squeeze(1)
        num_odd += len(differs)
        if num_odd > most_odd:
            return None
        odd.append((differs + chunk.start).to(torch.int32))
    places = torch.cat(odd)
    if digest_of(flat) != key.digest:
        return None
    return TensorKeyedPayload(table, key=key, odd_places=places, odd_rows=rows[places.long()])
