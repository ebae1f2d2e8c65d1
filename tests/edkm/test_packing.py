"""Indices packed to exactly their bits, and back."""

import pytest
import torch

from edkm.packing import pack, packed_bytes, unpack, unpack_at


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("num_indices", [0, 1, 7, 8, 9, 63, 64, 65, 1000, 4096])
def test_round_trip(bits: int, num_indices: int) -> None:
    indices = torch.randint(0, 1 << bits, (num_indices,), dtype=torch.uint8)
    planes = pack(indices, bits=bits)
    assert planes.dtype == torch.uint8
    assert planes.nbytes == packed_bytes(num_indices, bits=bits)
    assert planes.nbytes <= num_indices * bits / 8 + bits
    assert torch.equal(unpack(planes, num_indices=num_indices), indices)
    positions = torch.randint(0, max(1, num_indices), (3, 5 if num_indices else 0))
    assert torch.equal(unpack_at(planes, positions), indices.long()[positions])


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_where_a_bit_lies(bits: int) -> None:
    """The layout is the file format: index i is in byte i mod M of each plane, at bit i div M."""
    for position in range(20):
        indices = torch.zeros(20, dtype=torch.uint8)
        indices[position] = 1 << (bits - 1)
        planes = pack(indices, bits=bits)
        expected = torch.zeros(bits, 3, dtype=torch.uint8)
        expected[bits - 1, position % 3] = 1 << (position // 3)
        assert torch.equal(planes, expected)
