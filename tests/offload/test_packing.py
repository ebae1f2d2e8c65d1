"""Packing of small integers: every width, odd sizes, and how many bytes it takes."""

import pytest
import torch

from offload.codecs.packing import bits_for, pack, packed_bytes, unpack, unpack_at

SIZES = (0, 1, 7, 8, 9, 63, 64, 65, 127, 1000, 4097)


@pytest.mark.parametrize("bits", range(17))
def test_items_come_back_at_every_width_and_size(bits: int) -> None:
    for size in SIZES:
        for dtype in (torch.int32, torch.int64):
            items = torch.randint(1 << bits, (size,), dtype=dtype)
            if size:
                items[-1] = (1 << bits) - 1
            packed = pack(items, bits=bits)
            assert packed.dtype == torch.uint8
            assert packed.numel() == packed_bytes(size, bits)
            assert torch.equal(unpack(packed, bits=bits, num_items=size), items.int())


@pytest.mark.parametrize("bits", range(17))
def test_some_items_come_back_without_the_rest(bits: int) -> None:
    for size in SIZES[1:]:
        items = torch.randint(1 << bits, (size,), dtype=torch.int32)
        places = torch.cat([torch.randint(size, (50,)), torch.tensor([0, size - 1])])
        packed = pack(items, bits=bits)
        assert torch.equal(unpack_at(packed, places, bits=bits, num_items=size), items[places])


@pytest.mark.parametrize("bits", range(17))
def test_the_bytes_are_the_bits_and_a_padding_of_a_lane_a_plane(bits: int) -> None:
    for size in SIZES:
        least = -(-size * bits // 8)
        assert least <= packed_bytes(size, bits) <= least + 8 * bits.bit_count()
    assert packed_bytes(1 << 20, bits) == bits << 17


def test_bits_tell_the_values_apart() -> None:
    assert [bits_for(number) for number in (0, 1, 2, 3, 4, 5, 256, 257, 65536)] == [
        0,
        0,
        1,
        2,
        2,
        3,
        8,
        9,
        16,
    ]


def test_items_of_a_strided_list_come_back() -> None:
    items = torch.randint(8, (999, 2), dtype=torch.int32)[:, 1]
    assert torch.equal(unpack(pack(items, bits=3), bits=3, num_items=999), items)


def test_the_packed_bytes_do_not_depend_on_what_lay_there_before() -> None:
    """Padding is part of what index lists are compared by."""
    items = torch.randint(1 << 11, (77,), dtype=torch.int32)
    first = pack(items, bits=11)
    for _ in range(20):
        del_me = torch.full((first.numel(),), 255, dtype=torch.uint8)
        del del_me
        assert torch.equal(pack(items, bits=11), first)
