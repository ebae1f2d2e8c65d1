"""Equal bytes, whatever the dtype and the numbers are."""

import pytest
import torch

from offload import same


@pytest.mark.parametrize("finds_memcmp", [True, False])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("size", [0, 1, 7, 4099])
def test_one_bit_tells(
    size: int, dtype: torch.dtype, finds_memcmp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert same._memcmp is not None
    if not finds_memcmp:
        monkeypatch.setattr(same, "_memcmp", None)
    first = torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    second = first.clone()
    assert same.same_bytes(first, second)
    assert not same.same_bytes(first, torch.cat([second, second[:1] if size else second.new_zeros(1)]))
    for place in range(0, first.nbytes, 1 + first.nbytes // 5):
        other = second.clone()
        other.view(torch.uint8)[place] ^= 1 << (place % 8)
        assert not same.same_bytes(first, other)


def test_rows_of_either_shape() -> None:
    rows = torch.randint(0, 1000, (12, 5))
    assert same.same_bytes(rows, rows.clone().view(-1))
