"""The memory-regression benchmark says what grew, and sees nothing where nothing did."""

import json

from bench.memory import BASELINE, GRAPHS, STORES, grown, held

_BASELINE = {"held_bytes": 1000, "kept_bytes": {"a.py float32[10]": 600, "b.py float32[5]": 400}}


def test_growth_within_one_percent_passes() -> None:
    assert grown({"held_bytes": 1010, "kept_bytes": {}}, _BASELINE) is None


def test_growth_names_both_figures_and_the_tensors_that_grew() -> None:
    now = {
        "held_bytes": 1100,
        "kept_bytes": {"a.py float32[10]": 600, "b.py float32[5]": 450, "c.py bool[50]": 50},
    }
    complaint = grown(now, _BASELINE)
    assert complaint == (
        "held 1100 bytes, the baseline holds 1000\n"
        "  b.py float32[5]: 450 bytes, was 400\n"
        "  c.py bool[50]: 50 bytes, was 0"
    )


def test_the_baseline_has_every_graph() -> None:
    assert set(json.loads(BASELINE.read_text())) == {
        f"{graph}/{store}" for graph in GRAPHS for store in STORES
    }


def test_a_graph_is_held_in_fewer_bytes_with_uniquify() -> None:
    assert held("clustering", "uniquify")["held_bytes"] * 10 < held("clustering", "dedupe")["held_bytes"]
