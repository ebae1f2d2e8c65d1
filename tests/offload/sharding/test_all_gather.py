"""Sharding by all-gather: a range on each rank, right or the same error on all, and nobody waits for ever."""

import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bench.ranks import run_ranks
from offload import RankMismatchError, SavedTensorStore
from offload.sharding.all_gather import AllGather
from tests.offload.sharding.in_turn import run_in_turn

MIB = 1 << 20
TIMEOUT_SECONDS = 3.0


def sharing(*, uniquify: bool = False) -> SavedTensorStore:
    return SavedTensorStore(
        shard=AllGather(timeout_seconds=TIMEOUT_SECONDS), uniquify=uniquify, min_bytes=4096
    )


def equal_values(num: int, *, seed: int, shape: tuple[int, ...] = (512, 512)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(num)]


def saving(values: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return weights, and a loss for each of `values` whose graph saves it."""
    weights = [torch.ones_like(value, requires_grad=True) for value in values]
    losses = [(weight * value.clone()).sum() for weight, value in zip(weights, values, strict=True)]
    return weights, losses


def agreed(store: SavedTensorStore) -> None:
    """Let every rank tell, then every rank read."""
    store.report()
    dist.barrier()
    store.report()
    dist.barrier()


def check(weights: list[Tensor], values: list[Tensor], *, times: int = 1) -> None:
    for weight, value in zip(weights, values, strict=True):
        assert weight.grad is not None
        assert torch.equal(weight.grad, times * value)


# What the ranks run. Each prints nothing where all is right.


def replicated(rank: int) -> None:
    num_ranks = dist.get_world_size()
    for uniquify in (False, True):
        store = sharing(uniquify=uniquify)
        for number in range(3):
            values = [
                *equal_values(3, seed=number),
                *equal_values(2, seed=number, shape=(4099,)),
                torch.full((512, 512), 3.0),
                (equal_values(1, seed=7)[0] > 0) * 1.0,
            ]
            with store:
                weights, losses = saving(values)
            agreed(store)
            whole_bytes = sum(value.nbytes for value in values)
            others_bytes = 2 * MIB - (64 << 10) if uniquify else 0
            stats = store.stats
            assert stats.held_bytes <= -(-(whole_bytes - others_bytes) // num_ranks) + len(values), stats
            dist.barrier()
            assert store.stats.group_held_bytes == sum_of(store.stats.held_bytes)
            loss = torch.stack(losses).sum()
            del losses
            loss.backward(retain_graph=True)
            check(weights, values)
            loss.backward()
            check(weights, values, times=2)
            del loss
            stats = store.stats
            assert stats.held_bytes == 0
            assert stats.gathered_bytes >= 3 * MIB * (num_ranks - 1) // num_ranks


def sum_of(number: int) -> int:
    total = torch.tensor(number)
    dist.all_reduce(total)
    return int(total)


def differing(rank: int) -> None:
    """Other contents, other numbers, another order: some of what is equal is shared, and all is right."""
    store = sharing()
    with store:
        dist.barrier()  # all of them are there
    for number in range(3):
        mine = equal_values(2 + rank, seed=100 * rank + number)
        common = equal_values(4, seed=1000 + number)
        order = torch.randperm(4, generator=torch.Generator().manual_seed(rank + 10 * number)).tolist()
        values = mine + [common[place] for place in order]
        with store:
            weights, losses = saving(values)
        if number:
            agreed(store)
        loss = torch.stack(losses).sum()
        del losses
        loss.backward()
        check(weights, values)
        # As many as stand in one order on all ranks.
        assert 1 <= store.stats.num_by_stage.get("shared", 0) <= 4


def reordered(rank: int) -> None:
    """Each rank runs the backwards of one step in an order of its own."""
    store = sharing()
    values = equal_values(5, seed=0)
    with store:
        weights, losses = saving(values)
    agreed(store)
    for place in torch.randperm(5, generator=torch.Generator().manual_seed(rank)).tolist():
        losses[place].backward()
    check(weights, values)
    losses.clear()
    assert store.stats.held_bytes == 0


def accumulated(rank: int) -> None:
    """Several forwards and backwards in one context, one partial, and a graph that is dropped."""
    store = sharing()
    values = equal_values(3, seed=0)
    with store:
        for number in range(3):
            weights, losses = saving(values)
            store.report()
            if number == 1:
                torch.autograd.grad(losses[1], weights[1])
                continue
            torch.stack(losses).sum().backward()
            check(weights, values)
    with store:
        weights, losses = saving(values)
        del losses
        weights, losses = saving(equal_values(3, seed=1))
    torch.stack(losses).sum().backward()
    check(weights, equal_values(3, seed=1))


def alone(rank: int) -> None:
    """Only rank 0 enters: it ends right, and shares nothing."""
    if rank == 0:
        store = sharing()
        with store:
            weights, losses = saving(equal_values(3, seed=0))
        torch.stack(losses).sum().backward()
        check(weights, equal_values(3, seed=0))
        assert "shared" not in store.stats.num_by_stage
    dist.barrier()


def stopped(rank: int, moment: str) -> None:
    """One rank does not come: those that need it are told within the timeout, all alike."""
    store = sharing()
    with store:
        _, losses = saving(equal_values(3, seed=0))
        if moment == "forward" and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    if moment != "forward":
        agreed(store)
    began = time.monotonic()
    if rank == 1:
        if moment == "killed":
            losses[2].backward()
            os.kill(os.getpid(), signal.SIGKILL)
        if moment == "no backward":
            time.sleep(2 * TIMEOUT_SECONDS)
            os._exit(0)
    try:
        torch.stack(losses).sum().backward()
        sys.stdout.write("right")
    except RankMismatchError as error:
        assert "rank 1 of the group did not come" in str(error)  # noqa: PT017
        assert "(512, 512)" in str(error)  # noqa: PT017
        sys.stdout.write(str(error))
    assert time.monotonic() - began < 3 * TIMEOUT_SECONDS
    sys.stdout.flush()
    os._exit(0)


def corrupted(rank: int) -> None:
    store = sharing()
    with store:
        _, losses = saving(equal_values(2, seed=0))
    agreed(store)
    if rank == 1:
        stretch = store._settler.sharer._sharding._stretch
        for lease in stretch._leases.values():
            lease._shard[7] += 1
    with pytest.raises(RankMismatchError, match="rank 1 of the group holds a range that was changed"):
        torch.stack(losses).sum().backward()


def freed(rank: int) -> None:
    """One rank drops its graph; the others are told at once."""
    store = sharing()
    with store:
        _, losses = saving(equal_values(3, seed=0))
    agreed(store)
    if rank == 1:
        del losses[1:]
        losses[0].backward()
        return
    with pytest.raises(RankMismatchError, match="rank 1 of the group does not hold its range any more"):
        losses[2].backward()
    losses[0].backward()


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks(num_ranks: int) -> None:
    run_in_turn(__name__, "replicated", "differing", "reordered", num_ranks=num_ranks)


def test_two_ranks() -> None:
    # The last one makes a store on one rank alone.
    run_in_turn(__name__, "accumulated", "corrupted", "freed", "alone", num_ranks=2)


@pytest.mark.parametrize("moment", ["forward", "killed", "no backward"])
def test_a_rank_that_stops_is_named_by_all_others(moment: str) -> None:
    killed = frozenset() if moment == "no backward" else frozenset({1})
    outputs = run_ranks(f"{__name__}:stopped", moment, num_ranks=3, killed=killed)
    assert outputs[0] == outputs[2]
    assert outputs[0].startswith("right" if moment == "forward" else "backward needs a saved tensor")
