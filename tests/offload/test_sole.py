"""Who has a storage, and equal bytes that are not copied because nobody else has theirs."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from offload import SavedTensorStore
from offload.sole import is_sole

Keep = Callable[[Tensor], object]
KEPT: dict[str, Keep] = {
    "a tensor": lambda x: x,
    "a view": lambda x: x[1:],
    "an alias": lambda x: x.detach(),
    "the storage": lambda x: x.untyped_storage(),
    "numpy": lambda x: x.numpy(),
    "dlpack": lambda x: torch.from_dlpack(x.detach()),
    "a graph": lambda x: torch.ones(8, requires_grad=True) * x,
}


def test_a_storage_of_the_only_tensor_is_sole() -> None:
    for _ in range(3):
        alias = torch.randn(8).detach()
        assert is_sole(alias.untyped_storage(), num_aliases=1)
        second = alias.detach()
        assert not is_sole(alias.untyped_storage(), num_aliases=1)
        assert is_sole(second.untyped_storage(), num_aliases=2)


@pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT)
def test_what_somebody_else_has_is_not(keep: Keep) -> None:
    def saved() -> tuple[Tensor, object]:
        x = torch.randn(8)
        return x.detach(), keep(x)

    alias, kept = saved()
    assert not is_sole(alias.untyped_storage(), num_aliases=1)
    del kept


def test_memory_of_others_is_not() -> None:
    for alias in (torch.from_numpy(np.ones(8)), torch.frombuffer(bytearray(64), dtype=torch.float64)):
        assert not is_sole(alias.untyped_storage(), num_aliases=1)
    shared = torch.randn(8).share_memory_()
    assert not is_sole(shared.untyped_storage(), num_aliases=1)


class Scaled(torch.autograd.Function):
    """Multiplies by a tensor that nobody else keeps, and hands what it read back to the test."""

    read: list[Tensor]

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor.clone())
        return x * 1

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        [factor] = ctx.saved_tensors
        Scaled.read.append(factor)
        return gradient * factor, None


@pytest.fixture(autouse=True)
def nothing_read() -> Iterator[None]:
    Scaled.read = []
    yield
    Scaled.read = []


def pair(factor: Tensor, *, around: SavedTensorStore) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn_like(factor, requires_grad=True)
    with around:
        return x, Scaled.apply(x, factor), Scaled.apply(x, factor)


def test_equal_bytes_that_nobody_else_has_are_not_copied() -> None:
    factor, store = torch.randn(64, 33), SavedTensorStore()
    x, first, second = pair(factor, around=store)
    stats = store.stats
    assert (stats.held_bytes, stats.peak_held_bytes) == (factor.nbytes, 2 * factor.nbytes)
    del first  # what is left keeps the bytes
    [gradient] = torch.autograd.grad(second.sum(), x, retain_graph=True)
    assert torch.equal(gradient, factor)
    assert store.stats.held_bytes == factor.nbytes
    del second
    assert store.stats.held_bytes == 0


def test_what_a_reader_writes_is_not_read_by_the_other() -> None:
    factor = torch.randn(64, 33)
    x, first, second = pair(factor, around=SavedTensorStore())
    for write in (lambda x: x.add_(1), lambda x: x.data.add_(1)):
        for output in (first, second, first):
            [gradient] = torch.autograd.grad(output.sum(), x, retain_graph=True)
            assert torch.equal(gradient, factor)
            write(Scaled.read.pop())


def test_what_somebody_else_has_is_copied_first() -> None:
    x, factor, store = torch.randn(64, 33, requires_grad=True), torch.randn(64, 33), SavedTensorStore()
    twin = factor.clone()
    with store:
        output = x * factor + x * twin
    right = 2 * factor
    factor.zero_()
    twin.zero_()
    output.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, right)
