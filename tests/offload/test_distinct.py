"""Distinct rows: the table and the list give the rows back, whatever the hash does."""

import numpy
import pytest
import torch
from torch import Tensor

from offload.codecs import distinct
from offload.codecs.distinct import DistinctRows, draw_sample, number_rows

DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


def rows_of(num_rows: int, *, num_distinct: int, num_lanes: int, dtype: torch.dtype) -> Tensor:
    """Return rows of which exactly `num_distinct` differ, when the dtype has as many."""
    limits = torch.iinfo(dtype)
    table = torch.randint(limits.min, limits.max, (num_distinct, num_lanes), dtype=dtype)
    return table[torch.randint(num_distinct, (num_rows,))]


def check(lanes: Tensor, *, limit: int) -> None:
    """Compare with torch's own unique."""
    num_distinct = len(torch.unique(lanes, dim=0))
    found = number_rows(lanes, limit=limit)
    if found is None:
        assert num_distinct > min(limit, 1 << 16)
        return
    table, index, first = found
    assert len(table) == len(first) == num_distinct <= limit
    assert torch.equal(table[index], lanes)
    assert torch.equal(lanes[first], table)
    assert index.dtype == first.dtype == torch.int32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_lanes", [1, 2, 3, 8, 33])
def test_every_row_gets_its_number(num_lanes: int, *, dtype: torch.dtype) -> None:
    for num_rows in (1, 2, 1023, 1024, 1025, 9001):
        for num_distinct in (1, 2, 3, 100, 4000):
            lanes = rows_of(num_rows, num_distinct=num_distinct, num_lanes=num_lanes, dtype=dtype)
            check(lanes, limit=5000)


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_one_row_too_many_is_too_many(beyond: int) -> None:
    lanes = torch.arange(3000 + beyond).repeat(2).view(-1, 1)
    found = number_rows(lanes, limit=3000)
    assert (found is None) == (beyond == 1)


def test_more_than_sixteen_bits_are_never_made() -> None:
    assert number_rows(torch.arange(65536).view(-1, 1), limit=1 << 20) is not None
    assert number_rows(torch.arange(65537).view(-1, 1), limit=1 << 20) is None
    assert number_rows(torch.arange(5).view(-1, 1), limit=0) is None


@pytest.mark.parametrize("multiplier", [0, 1, 1 << 32, 1 << 62])
@pytest.mark.parametrize("num_lanes", [1, 4])
def test_rows_whose_hashes_collide_are_told_apart(
    num_lanes: int, *, multiplier: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With multipliers like these all rows, or nearly all, hash to one slot."""
    monkeypatch.setattr(
        distinct, "_multipliers", lambda num_lanes: numpy.full(num_lanes, multiplier, dtype=numpy.int64)
    )
    lanes = rows_of(1500, num_distinct=100, num_lanes=num_lanes, dtype=torch.int32)
    check(lanes, limit=150)
    check(lanes, limit=50)
    check(torch.cat([lanes, lanes.flip(1)]), limit=400)


def test_rows_with_an_equal_sum_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Permuted lanes, under multipliers that are all alike."""
    monkeypatch.setattr(
        distinct, "_multipliers", lambda num_lanes: numpy.full(num_lanes, 0x9E3779B97F4A7C15 >> 1)
    )
    lanes = torch.tensor([[1, 2, 3], [3, 2, 1], [2, 2, 2], [1, 2, 3], [6, 0, 0]]).repeat(400, 1)
    check(lanes, limit=10)


def test_numbers_are_those_of_bits_not_of_values() -> None:
    floats = torch.tensor([0.0, -0.0, float("nan"), -float("nan")]).repeat(50)
    lanes = floats.view(torch.int32).view(-1, 1)
    table, _, _ = number_rows(lanes, limit=10)
    assert len(table) == 4


def test_a_table_is_a_copy() -> None:
    lanes = torch.arange(8).repeat(4).view(-1, 1)
    rows = DistinctRows(lanes, limit=8)
    rows.number(lanes, start=0)
    rows.table.zero_(), rows.first.zero_()
    assert sorted(rows.table.flatten().tolist()) == list(range(8))
    assert torch.equal(lanes[rows.first], rows.table)


@pytest.mark.parametrize("num_distinct", [1, 3, 100, 5000, 60_000])
def test_an_estimate_from_a_sample_is_near(num_distinct: int) -> None:
    """Within a factor of three of the truth, or declined at the limit."""
    lanes = torch.randint(num_distinct, (200_000, 1))
    num_true = len(lanes.unique())
    for limit in (num_distinct, 65_536):
        estimate = draw_sample(lanes, limit=limit, factor=4).num_distinct()
        if estimate is None:
            assert limit < 3 * num_true
        else:
            assert num_true / 3 <= estimate <= num_true * 3


@pytest.mark.parametrize("num_lanes", [1, 2, 8, 40])
def test_all_different_rows_are_seen_from_a_sample(num_lanes: int) -> None:
    lanes = torch.randint(1 << 62, (20_000, num_lanes))
    sample = draw_sample(lanes, limit=5_000)
    assert len(sample.rows) < 1_000
    assert sample.num_distinct() is None


@pytest.mark.parametrize("num_rows", [1, 2, 63, 64, 65, 1000, 4097])
def test_a_sample_is_made_of_rows(num_rows: int) -> None:
    for num_lanes in (1, 3, 40):
        lanes = torch.arange(num_rows).view(-1, 1).repeat(1, num_lanes)
        for limit in (1, 64, num_rows):
            sample = torch.from_numpy(draw_sample(lanes, limit=limit).rows)
            assert (sample == sample[:, :1]).all()
            assert int(sample.min()) >= 0
            assert int(sample.max()) < num_rows
            assert len(sample[:, 0].unique()) == len(sample)
