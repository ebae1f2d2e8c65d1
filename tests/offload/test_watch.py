"""Storages of which the store has bytes of its own, while others have them."""

import weakref

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

from offload import SavedTensorStore
from offload.digest import digest_of
from offload.watch import Watch
from tests.laws.settings import no_gc


def watch(*saved: Tensor) -> Watch:
    return Watch([(each, each._version) for each in saved], digest=digest_of(saved[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.bool, torch.int64])
def test_only_a_write_behind_the_counter_is_told(dtype: torch.dtype) -> None:
    x = torch.randn(6, 5).to(dtype)
    seen = watch(x[1:].detach())
    assert seen.written() is None
    x.data.logical_not_()
    assert seen.written() is x.untyped_storage()
    x.logical_not_()
    assert seen.written() is None


def test_what_one_counter_saw_is_no_blind_write_to_the_other() -> None:
    x = torch.randn(8)
    for write in (x, x.data):
        seen = watch(x.detach(), write)
        write.add_(1)
        assert seen.written() is None


@pytest.mark.parametrize("uniquify", [False, True])
def test_an_alias_with_a_counter_of_its_own_saw_the_write(uniquify: bool) -> None:
    weight, x = torch.ones(4096, requires_grad=True), (torch.arange(4096) % 3).float()
    alias, right = x.data, 3 * x
    with SavedTensorStore(uniquify=uniquify, min_bytes=4096):
        output = weight * x + weight * alias + weight * x.clone()
    x.add_(1)
    output.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, right)


def test_a_dtensor_that_was_changed_comes_back_as_it_was_saved() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh, values = init_device_mesh("cpu", (1,)), torch.arange(4096.0) % 4
        weight = DTensor.from_local(torch.ones(4096), mesh, [Replicate()]).requires_grad_()
        x = DTensor.from_local(values.clone(), mesh, [Replicate()])
        with SavedTensorStore(uniquify=True, min_bytes=4096):
            output = (weight * x).sum()
        x.add_(5)
        output.backward()
        assert torch.equal(weight.grad.to_local(), values)
    finally:
        dist.destroy_process_group()


def test_a_late_dtensor_that_its_counter_saw_written_comes_back_as_it_was_saved() -> None:
    """Equal bytes are held, and its local tensor, whose counter did not move, is somebody else's too."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh, values = init_device_mesh("cpu", (1,)), torch.randn(64, 64)
        store, other = SavedTensorStore(min_bytes=4096), torch.ones(64, 64, requires_grad=True)

        def sigmoid() -> Tensor:
            return DTensor.from_local(values.clone(), mesh, [Replicate()]).requires_grad_().sigmoid()

        for _ in range(3):
            with store:
                losses = [sigmoid().to_local().sum() for _ in range(4)]
            sum(losses).backward()  # type: ignore[union-attr]
        with store:
            equal = values.clone().requires_grad_().sigmoid()
            saved = sigmoid()
            product = (saved._local_tensor * other).sum()  # type: ignore[attr-defined]
        with torch.no_grad():
            saved.mul_(0)
        assert torch.equal(saved.grad_fn._saved_result.to_local(), values.sigmoid())  # type: ignore[union-attr]
        del equal, product
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the mode looks at it
@pytest.mark.parametrize("is_dropped", [False, True])
def test_backward_under_a_fake_mode(is_dropped: bool) -> None:
    x, weight = torch.arange(4096.0) % 4, torch.ones(4096, requires_grad=True)
    with SavedTensorStore(uniquify=True, min_bytes=4096):
        output = (weight * x).sum()
    if is_dropped:
        del x
    with FakeTensorMode(allow_non_fake_inputs=True):
        [gradient] = torch.autograd.grad(output, weight)
    assert gradient.shape == weight.shape


def test_a_storage_that_others_let_go_is_freed_and_no_matter() -> None:
    with no_gc():
        x = torch.randn(8)
        seen, storage = watch(x.detach()), weakref.ref(x.untyped_storage())
        x.data.zero_()
        del x
        assert storage() is None
        assert seen.written() is None


def test_a_storage_that_lost_its_bytes_is_no_matter() -> None:
    x = torch.randn(8)
    seen = watch(x.detach())
    x.untyped_storage().resize_(0)
    assert seen.written() is None


def test_what_was_dropped_comes_back_as_it_was_saved() -> None:
    x, mask = torch.randn(64, 33, requires_grad=True), (torch.rand(64, 33) > 0.5).float()
    store = SavedTensorStore(uniquify=True, min_bytes=4096)
    with store:
        output = x * mask
    [gradient] = torch.autograd.grad(output.sum(), x, retain_graph=True)
    assert torch.equal(gradient, mask)
    right = mask.clone()
    mask.data.zero_()
    [gradient] = torch.autograd.grad(output.sum(), x, retain_graph=True)
    assert not gradient.any()
    del mask
    output.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, right)
