"""Small integers packed to exactly their bits, bit by bit in planes, and read back whole or one by one."""

from __future__ import annotations

import torch

_LANES = 8
# The lowest bit of each byte of a word: eight indices are unpacked by one operation.
_LOW_BITS = 0x0101010101010101


def packed_bytes(num_indices: int, *, bits: int) -> int:
    """Bytes that `pack` makes of so many indices."""
    return bits * -(-num_indices // _LANES)


def pack(indices: torch.Tensor, *, bits: int) -> torch.Tensor:
    """Pack indices; index i is in byte i mod M of each plane, at bit i div M.

    Arguments:
        indices: `[N]` uint8, each below 2**bits.
        bits: 1 to 8.

    Returns:
        `[bits, M]` uint8 with M = ceil(N / 8); unused bits are 0.
    """
    num_columns = -(-indices.numel() // _LANES)
    lanes = indices.new_zeros(_LANES * num_columns)
    lanes[: indices.numel()] = indices
    planes = indices.new_zeros(bits, num_columns)
    for lane, values in enumerate(lanes.view(_LANES, num_columns)):
        for bit in range(bits):
            planes[bit] |= ((values >> bit) & 1) << lane
    return planes


def unpack(planes: torch.Tensor, *, num_indices: int) -> torch.Tensor:
    """Read all indices back, the inverse of `pack`.

    Arguments:
        planes: `[bits, M]` uint8.
        num_indices: N.

    Returns:
        `[N]` uint8.
    """
    bits, num_columns = planes.shape
    padded = planes.new_zeros(bits, max(8, -(-num_columns // 8) * 8))
    padded[:, :num_columns] = planes
    words = padded.view(torch.int64)
    lanes = words.new_zeros(_LANES, words.shape[1])
    for lane in range(_LANES):
        for bit in range(bits):
            lanes[lane] |= ((words[bit] >> lane) & _LOW_BITS) << bit
    return lanes.view(torch.uint8)[:, :num_columns].reshape(-1)[:num_indices]


def unpack_at(planes: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Read some of the indices.

    Arguments:
        planes: `[bits, M]` uint8.
        positions: int64, any shape; which indices.

    Returns:
        int64, in the shape of `positions`.
    """
    bits, num_columns = planes.shape
    lane, column = positions // max(1, num_columns), positions % max(1, num_columns)
    indices = torch.zeros_like(positions)
    for bit in range(bits):
        indices |= ((planes[bit][column].long() >> lane) & 1) << bit
    return indices
