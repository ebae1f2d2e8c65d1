"""Ranks that save, read and look unalike under all-gather, and end right all the same."""

import threading
import time

import torch
import torch.distributed as dist
from torch import Tensor

from bench.ranks import run_ranks
from offload import SavedTensorStore
from offload.sharding.all_gather import AllGather
from tests.offload.sharding.in_turn import run_in_turn
from tests.offload.sharding.test_all_gather import (
    TIMEOUT_SECONDS,
    agreed,
    check,
    equal_values,
    saving,
    sharing,
)


def backward(losses: list[Tensor], *, retain_graph: bool = False) -> None:
    torch.stack(losses).sum().backward(retain_graph=retain_graph)


def reads(rank: int) -> None:
    """Rank 0 saves some of the same twice: it reads more often, and gathers no more often."""
    for uniquify in (False, True):
        store = sharing(uniquify=uniquify)
        first, second, third = equal_values(3, seed=0)
        mask = (second > 0) * 1.0
        values = [first, second, third, mask, *([third, mask * 1.0, first] if rank == 0 else [])]
        with store:
            weights, losses = saving(values)
        agreed(store)
        backward(losses)
        check(weights, values)


def backwards(rank: int) -> None:
    """Rank 0 runs the backward twice."""
    store = sharing()
    for number in range(2):
        values = equal_values(3, seed=number)
        with store:
            weights, losses = saving(values)
        agreed(store)
        backward(losses, retain_graph=True)
        if rank == 0:
            backward(losses, retain_graph=True)
        check(weights, values, times=2 - rank)
        del losses
        assert store.stats.held_bytes == 0


def contexts(rank: int) -> None:
    """Two contexts and one backward; one rank announces after the other has looked."""
    store = sharing()
    values = equal_values(4, seed=0)
    time.sleep(0.3 * rank)
    with store:
        weights, losses = saving(values[:2])
    with store:
        more_weights, more_losses = saving(values[2:])
    dist.barrier()
    backward(losses + more_losses)
    check(weights + more_weights, values)


def graphs(rank: int) -> None:
    """Of two saves of the same bytes the first one's graph ends, on rank 1 before anything is agreed."""
    store = sharing()
    values = equal_values(2, seed=0)
    with store:
        first = saving(values[:1])
        weights, losses = saving(values)
        if rank == 1:
            store.report()
            first = None
        dist.barrier()
        store.report()
        first = None  # noqa: F841 - its end is the point
        dist.barrier()
    agreed(store)
    backward(losses)
    check(weights, values)


def groups(rank: int) -> None:
    """Two groups that have one rank in common."""
    pairs = [dist.new_group([0, 1]), dist.new_group([0, 2])]
    for number, members in enumerate(((0, 1), (0, 2))):
        if rank in members:
            policy = AllGather(group=pairs[number], timeout_seconds=TIMEOUT_SECONDS)
            store = SavedTensorStore(shard=policy)
            values = equal_values(2, seed=number)
            with store:
                weights, losses = saving(values)
            while store.stats.num_by_stage.get("shared", 0) < 2:
                time.sleep(0.01)
            backward(losses)
            check(weights, values)
        dist.barrier()


def threads(rank: int) -> None:
    """Two stores at once, each on a thread of its own."""
    stores = [sharing(), sharing()]
    for store in stores:
        with store:
            pass  # joins, in the same order on both ranks
    ended = []

    def train(number: int) -> None:
        for step in range(3):
            values = equal_values(4, seed=10 * number + step, shape=(256 + 128 * number, 512))
            with stores[number]:
                weights, losses = saving(values)
            stores[number].report()
            time.sleep(0.1)
            stores[number].report()
            backward(losses)
            check(weights, values)
        ended.append(number)

    running = [threading.Thread(target=train, args=(number,)) for number in range(2)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert sorted(ended) == [0, 1]


def delayed(rank: int) -> None:
    """Between two backwards a rank is busy for longer than the timeout, and the other does not wait yet."""
    store = SavedTensorStore(shard=AllGather(timeout_seconds=1.0))
    values = equal_values(4, seed=0)
    with store:
        weights, losses = saving(values)
    agreed(store)
    for loss in reversed(losses):
        loss.backward()
        dist.barrier()
        time.sleep(1.2 * rank)
        dist.barrier()
    check(weights, values)


def dropped(rank: int) -> None:
    """Rank 0 drops graph and store while gathers are under way to which rank 1 has not come."""
    store = sharing()
    _, losses = saved_by(store, equal_values(4, seed=0))
    agreed(store)
    losses.pop().backward()
    if rank == 0:
        losses.pop().backward()  # the one after it is under way now
        losses.clear()
        del store
    dist.barrier()


def saved_by(store: SavedTensorStore, values: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    with store:
        return saving(values)


CASES = ("reads", "backwards", "contexts", "graphs", "threads", "delayed", "dropped")


def test_two_ranks() -> None:
    run_in_turn(__name__, *CASES, num_ranks=2)


def test_groups_may_overlap() -> None:
    run_ranks(f"{__name__}:groups", num_ranks=3)
