"""What each codec makes of the contents it is for, byte by byte, and what it declines."""

import pytest
import torch
from torch import Tensor

from offload import SavedTensorStore
from offload.codecs.packing import packed_bytes
from offload.stats import Stats

ENTRY_BYTES = 4
"""Of an index list, for the place at which each distinct row first stands."""


class Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, weight: Tensor, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        return weight.clone()


def stats_of(*tensors: Tensor, **options: object) -> Stats:
    """Save the tensors under one node each and return what the store says of them."""
    store = SavedTensorStore(**{"uniquify": True, "min_bytes": 0, **options})
    weight = torch.zeros((), requires_grad=True)
    with store:
        outputs = [Keep.apply(weight, tensor) for tensor in tensors]
    stats = store.stats
    del outputs
    assert store.stats.held_bytes == 0
    return stats


def table_bytes(numel: int, *, num_values: int, item_bytes: int) -> int:
    bits = (num_values - 1).bit_length()
    return packed_bytes(numel, bits) + num_values * (item_bytes + ENTRY_BYTES)


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int16, torch.bfloat16, torch.float32, torch.float64, torch.complex64],
    ids=str,
)
def test_a_mask_takes_one_bit_whatever_its_dtype(dtype: torch.dtype) -> None:
    mask = (torch.rand(64, 1000) > 0.5).to(dtype)
    stats = stats_of(mask)
    assert stats.num_by_stage == {"bits": 1}
    assert stats.held_bytes == table_bytes(64_000, num_values=2, item_bytes=dtype.itemsize)
    assert stats.held_bytes < 64_000 / 8 + 50


@pytest.mark.parametrize(
    ("bits", "num_values"), [(2, 3), (2, 4), (3, 5), (4, 16), (6, 64), (8, 255), (9, 257)]
)
def test_few_values_take_the_bits_that_tell_them_apart(bits: int, *, num_values: int) -> None:
    patterns = torch.randn(num_values)
    x = patterns[torch.cat([torch.arange(num_values), torch.randint(num_values, (60_001 - num_values,))])]
    stats = stats_of(x)
    assert stats.num_by_stage == {"bits": 1}
    assert stats.held_bytes == packed_bytes(60_001, bits) + num_values * (4 + ENTRY_BYTES)


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32, torch.complex128], ids=str)
def test_one_value_everywhere_takes_no_bits(dtype: torch.dtype) -> None:
    stats = stats_of(torch.ones(333, 77, dtype=dtype))
    assert stats.held_bytes <= 32
    assert sum(stats.num_by_stage.get(name, 0) for name in ("bits", "cast")) == 1


def test_a_value_that_stands_once_comes_back() -> None:
    """A sample does not meet it; the pass does."""
    x = torch.zeros(70_000)
    for place in (0, 1, 34_567, 69_999):
        x[place] = float(place + 2)
        weight = torch.ones(70_000, requires_grad=True)
        with SavedTensorStore(uniquify=True) as store:
            y = weight * x
        assert store.stats.held_bytes < 70_000
        (gradient,) = torch.autograd.grad(y.sum(), weight)
        assert torch.equal(gradient, x)


def test_rows_that_repeat_are_a_table_and_a_list() -> None:
    table = torch.randn(300, 16)
    x = table[torch.cat([torch.arange(300), torch.randint(300, (19_700,))])]
    stats = stats_of(x)
    assert stats.num_by_stage == {"rows": 1}
    assert stats.held_bytes == packed_bytes(20_000, 9) + 300 * (64 + ENTRY_BYTES)


def test_rows_are_found_along_the_stride_of_one() -> None:
    """A transposed map, and one with a dimension in front."""
    x = torch.randn(100, 8)[torch.randint(100, (9_000,))]
    held = stats_of(x).held_bytes
    assert stats_of(x.t()).held_bytes == held
    assert stats_of(x.view(90, 100, 8).transpose(0, 1)).held_bytes == held
    assert held < x.nbytes / 4


def test_a_sixteen_bit_table_only_where_it_about_halves() -> None:
    """bf16 activations have hundreds of patterns, and a list of 11 of 16 bits is no win worth its time."""
    for num_values, stage in ((200, "bits"), (2_000, "reference"), (30_000, "reference")):
        patterns = torch.randperm(32_000)[:num_values].to(torch.int16).view(torch.bfloat16)
        x = patterns[torch.randint(num_values, (200_000,))]
        stats = stats_of(x)
        assert stats.num_by_stage == {stage: 1}, num_values
        assert stats.held_bytes <= x.nbytes * (9 / 16 if stage == "bits" else 1)
        assert stats_of(x.float()).held_bytes <= x.numel() * 4 * 9 / 16


def test_a_float_made_of_a_bfloat_is_held_as_one() -> None:
    x = torch.randn(300, 257).bfloat16()
    stats = stats_of(x.float() * 1.0)
    assert stats.num_by_stage == {"cast": 1}
    assert stats.held_bytes == x.nbytes


def test_token_numbers_keep_the_quarter_that_varies() -> None:
    tokens = torch.randperm(40_000)[:20_000].clone()
    stats = stats_of(tokens)
    assert stats.held_bytes == 20_000 * 2


def test_small_mostly_distinct_tensors_are_not_enlarged() -> None:
    for numel in (1, 3, 10, 100, 1792, 3584):
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            x = torch.randperm(1 << 14)[:numel].to(dtype) * (3 if dtype is torch.int64 else 1)
            assert stats_of(x).held_bytes <= x.untyped_storage().nbytes(), (numel, dtype)


def test_tensors_on_small_storages_are_kept_by_reference() -> None:
    x = torch.randn(1024).sign()
    assert stats_of(x, min_bytes=4096).num_by_stage == {"bits": 1}
    assert stats_of(x, min_bytes=4097).num_by_stage == {"reference": 1}
    assert stats_of(x[:100], min_bytes=4097).held_bytes == 4096
    assert stats_of(torch.zeros(1023), min_bytes=4096).num_by_stage == {"reference": 1}


def test_equal_lists_are_kept_once() -> None:
    """Two tables, one list: the second tensor has other values at the same places."""
    numbers = torch.cat([torch.arange(4), torch.randint(4, (49_996,))])
    first, second = torch.randn(4)[numbers], torch.randn(4).double()[numbers]
    together = stats_of(first, second)
    assert together.held_bytes == packed_bytes(50_000, 2) + 4 * (4 + 8 + ENTRY_BYTES)
    assert together.num_saved == 2


def test_a_list_shared_by_payloads_is_freed_with_the_last() -> None:
    numbers = torch.randint(4, (50_000,))
    store, weight = SavedTensorStore(uniquify=True), torch.zeros((), requires_grad=True)
    with store:
        first = Keep.apply(weight, torch.randn(4)[numbers])
        second = Keep.apply(weight, torch.randn(4).double()[numbers])
    del first
    assert store.stats.held_bytes == packed_bytes(50_000, 2) + 4 * (8 + ENTRY_BYTES)
    del second
    assert store.stats.held_bytes == 0
