"""Pack small unsigned integers into planes of 16, 8, 4, 2 and 1 bits.

A width is a sum of plane widths: 11 bits are a plane of 8, one of 2 and one of 1. A plane narrower than a
byte is planar: byte `j` holds item `j` of each of `8 / width` segments, so packing is a shift and an or over
int64 lanes of eight bytes.
"""

import torch
from torch import Tensor

_LANE_ONES = 0x0101010101010101


def bits_for(num_values: int) -> int:
    """Return the bits that tell `num_values` values apart; 0 for one value."""
    return max(num_values - 1, 0).bit_length()


def packed_bytes(num_items: int, bits: int) -> int:
    """Return the bytes `pack` makes of `num_items` items of `bits` bits."""
    return sum(_plane_bytes(num_items, plane) for plane in _planes(bits))


def pack(items: Tensor, *, bits: int) -> Tensor:
    """Pack `items`, int32 or int64 `[N]` with values in 0 .. 2**bits - 1, bits at most 16, into uint8
    `[packed_bytes(N, bits)]`.
    """
    if not items.numel():
        return torch.empty(0, dtype=torch.uint8, device=items.device)
    packed = torch.empty(packed_bytes(items.numel(), bits), dtype=torch.uint8, device=items.device)
    start, shift = 0, 0
    for plane in _planes(bits):
        stop = start + _plane_bytes(items.numel(), plane)
        _pack_plane(items >> shift if shift else items, plane, packed[start:stop])
        start, shift = stop, shift + plane
    return packed


def unpack(packed: Tensor, *, bits: int, num_items: int) -> Tensor:
    """Return the items of `pack`, int32 `[num_items]`."""
    items = torch.zeros(num_items, dtype=torch.int32, device=packed.device)
    if not num_items:
        return items
    start, shift = 0, 0
    for plane in _planes(bits):
        stop = start + _plane_bytes(num_items, plane)
        values = _unpack_plane(packed[start:stop], plane, num_items)
        items |= values.to(torch.int32) << shift
        start, shift = stop, shift + plane
    return items


def unpack_at(packed: Tensor, places: Tensor, *, bits: int, num_items: int) -> Tensor:
    """Return the items of `pack` at `places`, int64 `[S]`, as int32 `[S]`, without unpacking the rest."""
    items = torch.zeros(places.numel(), dtype=torch.int32, device=packed.device)
    start, shift = 0, 0
    for plane in _planes(bits):
        stop = start + _plane_bytes(num_items, plane)
        values = packed[start:stop].view(torch.int16) if plane == 16 else packed[start:stop]
        if plane < 8:
            segment_bytes = values.numel()
            segment = places // segment_bytes
            values = (
                values.index_select(0, places - segment * segment_bytes).to(torch.int32) >> segment * plane
            )
        else:
            values = values.index_select(0, places).to(torch.int32)
        items |= (values & ((1 << plane) - 1)).to(torch.int32) << shift
        start, shift = stop, shift + plane
    return items


def _planes(bits: int) -> list[int]:
    return [plane for plane in (16, 8, 4, 2, 1) if bits & plane]


def _plane_bytes(num_items: int, plane: int) -> int:
    # Every plane is a whole number of lanes, so that the next one starts aligned.
    num_lane_items = 64 // plane
    return -(-num_items // num_lane_items) * 8


def _pack_plane(items: Tensor, plane: int, out: Tensor) -> None:
    if plane >= 8:
        values = out.view(torch.int16 if plane == 16 else torch.uint8)
        values[items.numel() :] = 0
        values[: items.numel()] = items  # the cast keeps the low bits
        return
    segments = torch.zeros(8 // plane, out.numel(), dtype=torch.uint8, device=out.device)
    segments.view(-1)[: items.numel()] = items & ((1 << plane) - 1)
    lanes, packed = segments.view(torch.int64), out.view(torch.int64)
    packed.copy_(lanes[0])
    for number in range(1, 8 // plane):
        packed |= lanes[number] << (number * plane)


def _unpack_plane(packed: Tensor, plane: int, num_items: int) -> Tensor:
    if plane == 16:
        return packed.view(torch.int16)[:num_items].to(torch.int32) & 0xFFFF
    if plane == 8:
        return packed[:num_items]
    lanes = packed.view(torch.int64)
    mask = _LANE_ONES * ((1 << plane) - 1)
    segments = torch.empty(8 // plane, lanes.numel(), dtype=torch.int64, device=packed.device)
    for number in range(8 // plane):
        torch.bitwise_and(lanes >> (number * plane), mask, out=segments[number])
    return segments.view(torch.uint8).view(-1)[:num_items]
