"""Ranks that save in orders of their own, while the model has collectives in backward."""

import torch
from torch import Tensor

from bench.chaos import Meeting
from bench.ranks import run_ranks
from tests.offload.sharding.test_all_gather import agreed, check, equal_values, sharing

ORDERS = ((5, 0, 1, 2, 3, 4), (5, 4, 3, 2, 1, 0), (3, 4, 5, 0, 1, 2))


def chained(values: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return weights, and a loss whose backward meets the other ranks before it reads each of `values`."""
    weights = [torch.ones_like(value, requires_grad=True) for value in values]
    loss = torch.zeros(())
    for weight, value in zip(weights, values, strict=True):
        loss = Meeting.apply(loss + (weight * value.clone()).sum())
    return weights, loss


def ordered(rank: int) -> None:
    store = sharing()
    for number, order in enumerate(ORDERS):
        values = equal_values(6, seed=number)
        if rank:
            values = [values[place] for place in (order if rank == 1 else ORDERS[number - 1])]
        with store:
            weights, loss = chained(values)
        agreed(store)
        loss.backward()
        check(weights, values)
        assert store.stats.num_by_stage["shared"] >= 1


def test_ranks_that_save_in_another_order_end_right() -> None:
    run_ranks(f"{__name__}:ordered", num_ranks=3)
