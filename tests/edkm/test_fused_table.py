"""The table of a 16-bit weight: counts, sums and look-ups, against loops over its bits."""

import pytest
import torch

from edkm.fused_table import Table

NARROW = [torch.float16, torch.bfloat16]
SHAPES = [((), 1), ((0, 3), 1), ((7,), 1), ((20, 30), 1), ((4, 400), 2), ((3, 90_001), 3), ((300_001,), 1)]


def weights(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Few values, both zeros and NaN among them."""
    pool = torch.tensor([0.0, -0.0, 1.5, -1.5, float("nan"), float("inf"), 6e-8, -2.0]).to(dtype)
    return pool[torch.randint(0, pool.numel(), shape)]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.int16)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize(("shape", "num_groups"), SHAPES, ids=str)
def test_counts_and_sums(dtype: torch.dtype, shape: tuple[int, ...], num_groups: int) -> None:
    weight, terms = weights(shape, dtype), torch.randn(shape).to(dtype)
    table = Table.of(weight, num_groups, dtype=dtype)
    patterns = table.patterns.to(torch.int16)
    torch.testing.assert_close(table.values, patterns.view(dtype).double(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(patterns.sort().values, bits(weight).unique())
    sums = table.sums(weight, terms)
    groups = zip(bits(weight).reshape(num_groups, -1), terms.reshape(num_groups, -1), strict=True)
    for number, (group, term) in enumerate(groups):
        for entry, pattern in enumerate(patterns):
            same = group == pattern
            assert int(table.counts[number, entry]) == int(same.sum())
            torch.testing.assert_close(sums[number, entry], term[same].double().sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize(("shape", "num_groups"), SHAPES, ids=str)
def test_look_ups(dtype: torch.dtype, shape: tuple[int, ...], num_groups: int) -> None:
    weight, at = weights(shape, dtype), torch.randn(shape).to(dtype)
    table = Table.of(weight, num_groups, dtype=dtype)
    slope, height = torch.randn(2, *table.counts.shape, dtype=torch.float64)
    found = table.look_up(weight, slope)
    line = table.look_up_line(weight, at, slope=slope, height=height)
    assert found.dtype == line.dtype == dtype
    assert found.shape == line.shape == weight.shape
    place = {pattern: entry for entry, pattern in enumerate(table.patterns.to(torch.int16).tolist())}
    entries = torch.tensor([place[pattern] for pattern in bits(weight).tolist()], dtype=torch.int64)
    groups = torch.arange(num_groups).repeat_interleave(weight.numel() // num_groups)
    assert torch.equal(found.reshape(-1), slope.to(dtype)[groups, entries])
    expected = slope[groups, entries] * at.reshape(-1).double() + height[groups, entries]
    torch.testing.assert_close(line.reshape(-1), expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_groups_too_small_for_their_patterns_have_no_table() -> None:
    weight = torch.arange(64).bfloat16().reshape(8, 8)
    assert Table.of(weight, 2, dtype=torch.bfloat16) is None
    assert Table.of(weight, 1, dtype=torch.bfloat16) is not None
    assert Table.of(weight // 32, 8, dtype=torch.bfloat16) is not None


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_the_variance_is_that_of_the_weight(dtype: torch.dtype) -> None:
    weight = (torch.randn(40, 300) * 0.02 + 0.01).to(dtype)
    for num_groups in (1, 4):
        table = Table.of(weight, 1, dtype=dtype)
        if num_groups == 4:
            table = Table.of(weight.round(decimals=2), 4, dtype=dtype)
        exact = (weight if num_groups == 1 else weight.round(decimals=2)).double().var(correction=0)
        torch.testing.assert_close(table.variance(), exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_it_comes_back_from_its_packed_form_and_only_a_small_one_has_one(dtype: torch.dtype) -> None:
    weight = weights((3, 90_001), dtype)
    table = Table.of(weight, 3, dtype=dtype)
    packed = table.packed(weight)
    assert packed.nbytes <= 4 * 4 * 8
    back = Table.unpacked(packed, dtype)
    assert torch.equal(back.patterns, table.patterns)
    assert torch.equal(back.counts, table.counts)
    torch.testing.assert_close(back.values, table.values, rtol=0, atol=0, equal_nan=True)
    many = torch.randn(400, 400).to(dtype)
    assert Table.of(many, 1, dtype=dtype).packed(many) is None
