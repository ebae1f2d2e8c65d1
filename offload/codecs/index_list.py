"""Packed lists of row numbers, kept once and shared by every payload whose rows they number."""

import weakref

import torch
import xxhash
from torch import Tensor

from offload.codecs.candidates import Candidates
from offload.codecs.packing import bits_for, pack, packed_bytes, unpack, unpack_at
from offload.ledger import Ledger
from offload.part import Part

_NUM_KEYS_TRIED = 4


class IndexList:
    """For each of N rows the number of its distinct row, packed. Owned by the payloads that use it, with its
    charges.
    """

    __slots__ = ("__weakref__", "_bits", "_first", "_packed", "num_rows")

    def __init__(self, packed: Tensor, *, bits: int, num_rows: int, first: Tensor, ledger: Ledger) -> None:
        self._packed = Part(packed, ledger=ledger)
        self._first = Part(first, ledger=ledger)
        self._bits = bits
        self.num_rows = num_rows

    @property
    def parts(self) -> tuple[Part, ...]:
        """The packed list and `first`."""
        return (self._packed, self._first)

    @property
    def is_near(self) -> bool:
        """Whether reading needs no other rank."""
        return self._packed.is_near and self._first.is_near

    @property
    def first(self) -> Tensor:
        """Where each number stands, int32 `[R]`."""
        return self._first.read()

    @property
    def num_distinct(self) -> int:
        """R, the number of distinct rows."""
        return len(self._first)

    @property
    def device(self) -> torch.device:
        """Where the list lies."""
        return self._packed.device

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed list and of `first`."""
        return self._packed.num_bytes + self._first.num_bytes

    def numbers(self) -> Tensor:
        """Return the list, int32 `[num_rows]`, with values below `num_distinct`."""
        return unpack(self._packed.read(), bits=self._bits, num_items=self.num_rows)

    def numbers_at(self, places: Tensor) -> Tensor:
        """Return the list at `places`, int64 `[S]`, as int32 `[S]`."""
        return unpack_at(self._packed.read(), places, bits=self._bits, num_items=self.num_rows)


class IndexLists:
    """The living index lists of a store, found by content or by length, and in `tensors` those that are saved
    tensors themselves. Holds all weakly.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.tensors = Candidates(ledger)
        self._by_content: weakref.WeakValueDictionary[tuple[bytes, int, int, torch.device], IndexList] = (
            weakref.WeakValueDictionary()
        )

    def __len__(self) -> int:
        return len(self._by_content)

    def keep(self, index: Tensor, *, first: Tensor) -> IndexList:
        """Return the living list equal to `index`, int32 `[N]`, or a new one where none can be read without
        other ranks; `first`, int32 `[R]`, is where each number stands.
        """
        bits = bits_for(first.numel())
        packed = pack(index, bits=bits)
        key = (xxhash.xxh3_128_digest(packed.cpu().numpy().data), bits, index.numel(), index.device)
        found = self._by_content.get(key)
        if found is None or not found.is_near:
            found = IndexList(packed, bits=bits, num_rows=index.numel(), first=first, ledger=self._ledger)
            self._by_content[key] = found
        return found

    def keys(self, num_rows: int, device: torch.device) -> list[IndexList]:
        """Return the youngest living lists with `num_rows` rows on `device`, to try as the key of a new
        block.
        """
        living = [
            each
            for each in self._by_content.values()
            if each.num_rows == num_rows and each.device == device and each.is_near
        ]
        return living[: -_NUM_KEYS_TRIED - 1 : -1]


def list_bytes(num_rows: int, num_distinct: int) -> int:
    """Return the bytes of an index list of `num_rows` rows, `num_distinct` of them distinct."""
    return packed_bytes(num_rows, bits_for(num_distinct)) + 4 * num_distinct
