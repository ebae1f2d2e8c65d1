"""Law 6: what is shared is equal on the ranks that share it, whatever else they do; random faults, seeded."""

from pathlib import Path

import pytest

from bench.chaos import FAULTS, MAY_REFUSE, POLICIES, run

pytestmark = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system in memory at /dev/shm")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(len(FAULTS)), ids=[fault.replace(" ", "-") for fault in FAULTS])
def test_each_rank_ends_right_or_is_told(seed: int, policy: str) -> None:
    # Each policy at 2 and 3 ranks, each fault at both.
    num_ranks = 2 + (seed + POLICIES.index(policy)) % 2
    fault, ends = run(seed, policy=policy, num_ranks=num_ranks)
    assert set(ends) <= {"right", "killed", "refused"}
    assert "refused" not in ends or fault in MAY_REFUSE[policy]
