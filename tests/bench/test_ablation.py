"""The reference graph saves what the paper's table says, and the store holds what each stage leaves."""

from bench.ablation import measure


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
