"""Who has a storage, and equal bytes that are not copied because nobody else has theirs."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from offload import SavedTensorStore, sole
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
    factor, store = torch.randn(64, 33), SavedTensorStore(min_bytes=4096)
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
    x, first, second = pair(factor, around=SavedTensorStore(min_bytes=4096))
    for write in (lambda x: x.add_(1), lambda x: x.data.add_(1)):
        for output in (first, second, first):
            [gradient] = torch.autograd.grad(output.sum(), x, retain_graph=True)
            assert torch.equal(gradient, factor)
            write(Scaled.read.pop())


def test_what_somebody_else_has_is_copied_first() -> None:
    x, factor, store = (
        torch.randn(64, 33, requires_grad=True),
        torch.randn(64, 33),
        SavedTensorStore(min_bytes=4096),
    )
    twin = factor.clone()
    with store:
        output = x * factor + x * twin
    right = 2 * factor
    factor.zero_()
    twin.zero_()
    output.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, right)


def test_what_unpack_handed_out_is_somebody_elses() -> None:
    x, store = torch.ones(4096, requires_grad=True), SavedTensorStore(min_bytes=4096)
    with store:
        first = x * torch.full((4096,), 2.0)
        assert store.stats.num_saved == 1  # settled
        handed = first.grad_fn._saved_other
        second = x * torch.full((4096,), 2.0)
    handed.add_(5)
    for output in (first, second):
        assert torch.autograd.grad(output.sum(), x)[0][0] == 2


def test_a_backward_that_writes_to_what_it_read_while_another_thread_saves_the_same() -> None:
    reading, saved = threading.Event(), threading.Event()

    class Reused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: FunctionCtx, weight: Tensor, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return weight * x

        @staticmethod
        def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
            [x] = ctx.saved_tensors
            reading.set()
            saved.wait(5)
            return x.mul_(3).mul_(gradient), None

    store = SavedTensorStore(min_bytes=4096)
    weight, other = (torch.ones(4096, requires_grad=True) for _ in range(2))
    with store:
        output = Reused.apply(weight, torch.full((4096,), 2.0))
    thread = threading.Thread(target=lambda: output.sum().backward())
    thread.start()
    reading.wait(5)
    with store:
        second = other * torch.full((4096,), 2.0)
    saved.set()
    thread.join()
    second.sum().backward()
    assert other.grad is not None
    assert other.grad[0] == 2


def test_storages_of_an_earlier_step_are_not_counted() -> None:
    x, store = torch.ones(4096, requires_grad=True), SavedTensorStore(min_bytes=4096)
    outputs = []
    for _ in range(2):
        with store:
            outputs.append(x * torch.full((4096,), 2.0))
    assert store.stats.storage_bytes == store.stats.saved_bytes == x.nbytes


COUNTED_UNDER_A_MODE = """
import sys
import torch
from torch.utils._python_dispatch import TorchDispatchMode
made = []
class Log(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made.append(function(*args, **(kwargs or {})))
        return made[-1]
def trace(frame, event, argument):
    made.append(frame.f_locals)
    return trace
sys.settrace(trace)
with Log():
    from offload import sole
sys.settrace(None)
print(sole._NUM_NAMES, sole._NUM_OWNERS)
"""


def test_it_counts_what_is_alone_whoever_looks_on(root: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", COUNTED_UNDER_A_MODE], cwd=root, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == [str(sole._NUM_NAMES), str(sole._NUM_OWNERS)]
