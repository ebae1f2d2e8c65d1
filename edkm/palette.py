"""A weight as a table of its values and one packed index for each of its vectors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from edkm.chunks import chunks
from edkm.errors import PaletteError
from edkm.packing import pack, packed_bytes, unpack, unpack_at
from edkm.patterns import NUM_PATTERNS, pattern_keys, pattern_values

# Bounds what is unpacked to wider integers at a time, in indices.
_CHUNK = 1 << 20


class Palette(nn.Module):
    """A weight of few values; owns the table and the packed indices, as buffers that move with the module.

    Arguments:
        table: `[G, 2**bits, d]`, the dtype of the weight; G groups of output channels, vectors of length d.
        indices: `[bits, ceil(N / 8)]` uint8, from `edkm.packing.pack`, with N = numel / d.
        shape: of the weight.

    Raises:
        PaletteError: table, indices and shape do not belong together.
    """

    table: torch.Tensor
    indices: torch.Tensor

    def __init__(self, table: torch.Tensor, indices: torch.Tensor, *, shape: tuple[int, ...]) -> None:
        super().__init__()
        check_parts(list(table.shape), list(indices.shape), shape=shape)
        if indices.dtype != torch.uint8 or not table.is_floating_point():
            raise PaletteError(
                f"a palette has a floating-point table and uint8 indices, got {table.dtype}, {indices.dtype}"
            )
        self.register_buffer("table", table)
        self.register_buffer("indices", indices)
        self.shape = tuple(shape)

    @classmethod
    def snap(cls, weight: torch.Tensor, centroids: torch.Tensor) -> Palette:
        """Give each vector of a weight the index of its nearest centroid.

        Arguments:
            weight: `[out, ...]`, floating point.
            centroids: `[G, K, d]`, K a power of 2 from 2 to 256; rounded to the weight's dtype first.
        """
        num_groups, num_centroids, length = centroids.shape
        table = centroids.detach().to(weight.dtype)
        rows = weight.detach().reshape(num_groups, -1, length)
        nearest = torch.cat([_nearest(part, entries) for part, entries in zip(rows, table, strict=True)])
        return cls(table, pack(nearest, bits=num_centroids.bit_length() - 1), shape=tuple(weight.shape))

    @property
    def bits(self) -> int:
        """Bits an index."""
        return self.indices.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of table and packed indices."""
        return self.table.nbytes + self.indices.nbytes

    def decode(self) -> torch.Tensor:
        """The weight, dense, in the dtype of the table."""
        num_groups, num_centroids, length = self.table.shape
        entries = self.table.reshape(-1, length)
        num_rows = math.prod(self.shape) // length
        indices = unpack(self.indices, num_indices=num_rows).view(num_groups, -1)
        weight = entries.new_empty(num_groups, indices.shape[1], length)
        starts = torch.arange(num_groups, dtype=torch.int32, device=entries.device).mul_(num_centroids)
        # Small groups several at once, large ones a chunk at a time.
        at_once = max(1, _CHUNK // max(1, indices.shape[1]))
        split = [torch.split(each, at_once) for each in (indices, starts, weight)]
        for parts, first, rows in zip(*split, strict=True):
            for chunk, out in zip(torch.split(parts, _CHUNK, 1), torch.split(rows, _CHUNK, 1), strict=True):
                numbers = chunk.int().add_(first.unsqueeze(1))
                torch.index_select(entries, 0, numbers.view(-1), out=out.view(-1, length))
        return weight.view(self.shape)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Some rows of a weight `[out, in]`; the others are decoded only when more are asked for than it has.

        Arguments:
            ids: integer, any shape; each from 0 to out - 1.

        Returns:
            `[*ids.shape, in]`.

        Raises:
            IndexError: there is no such row.
        """
        num_rows, width = self.shape
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= num_rows):
            raise IndexError(
                f"cannot look up rows {int(ids.min())} to {int(ids.max())} of {num_rows}: "
                "the tokens do not fit the model"
            )
        if ids.numel() > num_rows:
            return F.embedding(ids, self.decode())  # cheaper than to look the same rows up again and again
        num_groups, num_centroids, length = self.table.shape
        columns = torch.arange(width // length, device=ids.device)
        ids = ids.long().unsqueeze(-1)
        indices = unpack_at(self.indices, ids * (width // length) + columns)
        group = ids // (num_rows // num_groups)
        return self.table.reshape(-1, length)[indices + group * num_centroids].flatten(-2)

    def counts(self) -> torch.Tensor:
        """How many vectors have each entry of the table: `[G, 2**bits]` int64."""
        num_groups, num_centroids, length = self.table.shape
        indices = unpack(self.indices, num_indices=math.prod(self.shape) // length).view(num_groups, -1)
        return torch.stack([torch.bincount(part.int(), minlength=num_centroids) for part in indices])

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"shape={self.shape}, bits={self.bits}, num_bytes={self.num_bytes}"


def check_parts(table: list[int], indices: list[int], *, shape: tuple[int, ...]) -> None:
    """Check shapes of a table and of packed indices against the shape of their weight.

    Raises:
        PaletteError: they do not belong together.
    """
    if len(table) != 3 or 0 in table or len(indices) != 2 or not 1 <= indices[0] <= 8 or len(shape) < 1:
        raise PaletteError(
            f"a palette has a table [groups, entries, length] and indices [1 to 8, bytes], "
            f"got shapes {table} and {indices}"
        )
    bits = indices[0]
    if table[1] != 1 << bits:
        raise PaletteError(
            f"a table of {table[1]} entries does not fit indices of {bits} bits, which reach "
            f"{(1 << bits) - 1}: an index would be out of range"
        )
    if shape[0] % table[0] or shape[-1] % table[2]:
        raise PaletteError(
            f"a weight of shape {list(shape)} does not part into {table[0]} groups of {table[2]}"
        )
    expected = packed_bytes(math.prod(shape) // table[2], bits=bits)
    if indices[0] * indices[1] != expected:
        raise PaletteError(
            f"indices of {indices[0] * indices[1]} bytes do not fit a weight of shape {list(shape)}: "
            f"{bits} bits an index make {expected}"
        )


def _nearest(rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Index of the entry nearest to each row, uint8; of several, the first in the order of their values."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    if rows.element_size() == 2 and rows.shape[1] == 1 and rows.shape[0] > NUM_PATTERNS:
        return _nearest_by_pattern(rows.flatten(), table.to(wide))
    found = [_nearest_of(chunk.to(wide), table.to(wide)) for chunk in torch.split(rows, _CHUNK)]
    return torch.cat(found)


def _nearest_by_pattern(weights: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The same for many 16-bit weights, `[N]`: found for each pattern, and looked up."""
    every = pattern_values(torch.arange(NUM_PATTERNS, device=weights.device), weights.dtype)
    nearest = _nearest_of(every.unsqueeze(1).to(table.dtype), table)
    found = torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)
    for keys, target in zip(pattern_keys(weights, weights.dtype), chunks(found), strict=True):
        torch.index_select(nearest, 0, keys, out=target)
    return found


def _nearest_of(rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    if table.shape[1] > 1:
        return torch.cdist(rows, table, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1).byte()
    ordered, order = table.flatten().sort(stable=True)
    # Halved first: the sum of two large values could overflow.
    borders = ordered[1:] / 2 + ordered[:-1] / 2
    return order.byte()[torch.bucketize(rows.flatten(), borders, out_int32=True)]
