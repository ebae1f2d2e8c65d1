"""Law 6: what is shared is equal on the ranks that share it, whatever else they do; random faults, seeded."""

from pathlib import Path

import pytest

from bench.chaos import FAULTS, run

pytestmark = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system in memory at /dev/shm")


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("seed", range(len(FAULTS)), ids=[fault.replace(" ", "-") for fault in FAULTS])
def test_each_rank_ends_right_or_is_told(seed: int, num_ranks: int) -> None:
    fault, ends = run(seed, num_ranks=num_ranks)
    assert set(ends) <= {"right", "killed", "refused"}
    assert "refused" not in ends or fault == "overwritten"
