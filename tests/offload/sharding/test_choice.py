"""Which policy, and among which ranks."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from bench.ranks import run_ranks
from offload import SavedTensorStore
from offload.sharding.all_gather import AllGather
from offload.sharding.by_host import ByHost
from offload.sharding.local import Local
from tests.offload.sharding.test_all_gather import MIB, TIMEOUT_SECONDS, agreed, check, equal_values, saving


def by_host(rank: int) -> None:
    """Ranks 0 and 1 on one declared host, rank 2 on another: from the second step on all three gather."""
    for hosts, place in (("aab", "all-gather"), ("aaa", "memory")):
        within, between = Local(), AllGather(timeout_seconds=TIMEOUT_SECONDS)
        policy = ByHost(within=within, between=lambda between=between: between, host=hosts[rank])
        store = SavedTensorStore(shard=policy)
        for number in range(3):
            with store:
                weights, losses = saving(equal_values(2, seed=number))
            agreed(store)
            assert store.stats.num_by_stage.get("shared", 0) == 2 * (number > 0 and place == "all-gather")
            torch.stack(losses).sum().backward()
            check(weights, equal_values(2, seed=number))
        dist.barrier()


def meshed(rank: int) -> None:
    """Two by two ranks; values are equal along the second dimension only."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for shard in ("all-gather", "shared-memory", True):
        store = SavedTensorStore(shard=shard, group=mesh["tensor"])
        values = equal_values(2, seed=rank // 2)
        with store:
            weights, losses = saving(values)
        agreed(store)
        assert store.stats.num_by_stage.get("shared") == 2
        assert store.stats.group_held_bytes == 2 * MIB
        torch.stack(losses).sum().backward()
        check(weights, values)
        dist.barrier()


def test_ranks_along_one_dimension_of_a_mesh() -> None:
    run_ranks(f"{__name__}:meshed", num_ranks=4)


def test_a_group_needs_a_policy_by_name_and_one_dimension() -> None:
    mesh = SimpleNamespace(ndim=2)
    with pytest.raises(ValueError, match="group is given beside shard=False"):
        SavedTensorStore(group=mesh)
    with pytest.raises(ValueError, match="group is a mesh of 2 dimensions"):
        SavedTensorStore(shard=True, group=mesh)


def test_several_hosts_gather_and_one_host_does_not() -> None:
    run_ranks(f"{__name__}:by_host", num_ranks=3)
