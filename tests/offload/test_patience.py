"""Patience: a line is read until it won nothing eight times in a row, then ever more seldom."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from offload import SavedTensorStore
from offload.patience import Patience


def test_a_line_that_wins_is_always_read() -> None:
    patience = Patience()
    for _ in range(100):
        assert patience.is_worth_trying()
        patience.learn(won=True)


def test_a_line_that_loses_is_read_ever_more_seldom() -> None:
    patience, read = Patience(), []
    for number in range(5000):
        if patience.is_worth_trying():
            read.append(number)
            patience.learn(won=False)
    assert read[:8] == list(range(8))
    gaps = [after - before for before, after in pairwise(read[7:])]
    assert gaps[:9] == [9, 17, 33, 65, 129, 257, 513, 1025, 1025]


def test_one_win_brings_the_line_back() -> None:
    patience = Patience()
    for _ in range(20):
        patience.learn(won=False)
    while not patience.is_worth_trying():
        pass
    patience.learn(won=True)
    assert all(patience.is_worth_trying() for _ in range(10))


def save(store: SavedTensorStore, tensor: Tensor) -> Tensor:
    with store:
        return torch.ones_like(tensor).requires_grad_() * tensor


def test_a_store_learns_over_steps_and_finds_what_comes_to_be_worth_it() -> None:
    store = SavedTensorStore(uniquify=True, min_bytes=4096)
    losing = [save(store, torch.randn(2048)) for _ in range(30)]
    assert store.stats.num_by_stage == {"reference": 1}
    stages: list[str] = []
    for _ in range(80):
        losing.append(save(store, torch.ones(2048)))
        stages += store.stats.num_by_stage
    assert stages[-1] in ("bits", "cast", "content")
    assert "reference" in stages, "the line had lost its credit"


@pytest.mark.parametrize("dedupe", [True, False])
def test_what_is_not_read_is_right(dedupe: bool) -> None:
    store = SavedTensorStore(uniquify=True, dedupe=dedupe, min_bytes=4096)
    for _ in range(50):
        tensor = torch.randn(2048)
        weight = torch.randn(2048, requires_grad=True)
        with store:
            loss = (weight * tensor).sum()
        loss.backward()
        assert weight.grad is not None
        assert torch.equal(weight.grad, tensor)
        del loss
        assert store.stats.held_bytes == 0


def test_content_keeps_being_found_in_a_long_run() -> None:
    store = SavedTensorStore(min_bytes=4096)
    weights = [torch.randn(2048, requires_grad=True) for _ in range(3)]
    for _ in range(60):
        first, second = (hidden := torch.randn(2048)).clone(), hidden.clone()
        with store:
            loss = (weights[0] * first).sum()
            loss = loss + (weights[1] * second).sum()
            loss = loss + (weights[2] * torch.randn(2048)).sum()
        assert store.stats.num_by_stage["content"] == 1, (
            "the line that is found, and the one that finds, are read"
        )
        loss.backward()
