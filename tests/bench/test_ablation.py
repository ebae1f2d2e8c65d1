"""The reference graph saves what the paper's table says, and the store holds what each stage leaves."""

import pytest

from bench.ablation import measure, measure_ranks, table


def test_the_table_at_a_small_size() -> None:
    size = 128
    scale = (size / 4096) ** 2
    result = measure(size, num_rounds=1)
    assert abs(result["asked_mib"] - 1600 * scale) < 0.001
    assert abs(result["asked_for_parameters_mib"] - 64 * scale) < 0.001
    rows = result["rows"]
    assert abs(rows["none"]["held_mib"] - 1536 * scale) < 0.001
    assert rows["dedupe"]["held_mib"] <= 769 * scale
    assert rows["dedupe+uniquify"]["held_mib"] < rows["dedupe"]["held_mib"] / 4
    assert all(row["bit_identical"] and row["held_after_backward_bytes"] == 0 for row in rows.values())


def test_two_ranks_hold_a_half_each() -> None:
    scale = (256 / 4096) ** 2
    result = measure_ranks(256, num_ranks=2, num_rounds=2, medians_size=128)
    rows = result["rows"]
    assert rows["dedupe+shard"]["held_mib"] <= 400 * scale
    assert rows["dedupe+shard"]["group_held_mib"] <= 800 * scale
    # One step of this size, medians of a smaller one, and beside them the paper's.
    assert (result["medians_size"], result["medians_of_rounds"]) == (128, 2)
    assert all(min(row["one_step_over_plain"], row["time_over_plain"]) > 0 for row in rows.values())
    assert [each["time_over_plain"] for each in result["paper"].values()] == [1.0, 1.04, 1.1, 1.84, 1.72]
    told = table(result)
    assert "at 128 x 128" in told
    assert all(name in told for name in ("none", "dedupe+uniquify+shard", "1600.0", "12.3"))
    assert all(row["bit_identical"] and row["held_after_backward_bytes"] == 0 for row in rows.values())


def test_what_does_not_fit_is_refused_before_it_starts() -> None:
    with pytest.raises(SystemExit, match="64 ranks at 65536 x 65536 need about"):
        measure_ranks(65536, num_ranks=64, num_rounds=1)
