"""Memory regression: `pytest bench --benchmark-only` fails when a fixed graph is held in more bytes than the
baseline.
"""

import json
from typing import Any

import pytest

from bench.memory import BASELINE, GRAPHS, STORES, grown, held


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("graph", GRAPHS)
def test_held_bytes_do_not_grow(benchmark: Any, graph: str, store: str) -> None:
    """Hold one graph once and compare."""
    now = benchmark.pedantic(held, args=(graph, store), rounds=1)
    complaint = grown(now, json.loads(BASELINE.read_text())[f"{graph}/{store}"])
    assert complaint is None, complaint
