"""Ranks count steps and stretches alike, whatever they save: what was met once is met again."""

import torch
import torch.distributed as dist

from offload import SavedTensorStore
from offload.sharding.all_gather import AllGather
from offload.sharding.by_host import ByHost
from offload.sharding.local import Local
from tests.offload.sharding.in_turn import run_in_turn
from tests.offload.sharding.test_all_gather import (
    TIMEOUT_SECONDS,
    agreed,
    check,
    equal_values,
    saving,
    sharing,
)


def share_a_step(store: SavedTensorStore, *, seed: int) -> None:
    values = equal_values(2, seed=seed)
    with store:
        weights, losses = saving(values)
    agreed(store)
    assert store.stats.num_by_stage.get("shared", 0) == 2
    torch.stack(losses).sum().backward()
    check(weights, values)


def small(rank: int) -> None:
    """First, rank 1 saves nothing that is worth sharing; then it alone enters, and saves nothing."""
    store = sharing()
    with store:
        _, losses = saving(equal_values(2, seed=0, shape=(4, 4) if rank else (512, 512)))
    torch.stack(losses).sum().backward()
    if rank:
        with store, torch.no_grad():
            saving(equal_values(2, seed=0))
    share_a_step(store, seed=1)


def curved(rank: int) -> None:
    """Second derivatives of batches of which one settles early and the other late: no rank waits in vain."""
    store = sharing()
    with store:
        dist.barrier()
    waiting = store._settler.sharer._sharding._member._waiting
    for number in range(2):
        x = torch.randn(400 + 1000 * rank, 512, requires_grad=True)
        with store:
            value = sum((x * (each + 1)).sin().square().sum() for each in range(3))
            (slope,) = torch.autograd.grad(value, x, create_graph=True)
            loss = slope.square().sum()
        dist.barrier()
        loss.backward()
        dist.barrier()
        share_a_step(store, seed=number)
        assert waiting.seconds == TIMEOUT_SECONDS / 4


def hosts(rank: int) -> None:
    """Rank 0 learns of two hosts a step before rank 1, which enters first."""
    store = SavedTensorStore(
        shard=ByHost(
            within=Local(), between=lambda: AllGather(timeout_seconds=TIMEOUT_SECONDS), host=str(rank)
        )
    )
    for number in range(3):
        if rank == 0 and number < 2:
            dist.barrier()
        with store:
            _, losses = saving(equal_values(1, seed=number))
        torch.stack(losses).sum().backward()
        if rank == 1 and number < 2:
            dist.barrier()
    policy = store._settler.sharer._sharding._chosen
    assert isinstance(policy, AllGather)
    share_a_step(store, seed=3)


def test_ranks_that_enter_and_unpack_alike_count_alike() -> None:
    run_in_turn(__name__, "small", "curved", "hosts", num_ranks=2)
