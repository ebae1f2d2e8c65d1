"""Storages of which the store has bytes of its own, while others have them."""

import weakref

import pytest
import torch
from torch import Tensor

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
    assert seen.written(0) is None
    x.data.logical_not_()
    assert seen.written(0) is x.untyped_storage()
    x.logical_not_()
    assert seen.written(0) is None


def test_each_save_has_a_counter_of_its_own() -> None:
    x = torch.randn(8)
    seen = watch(x.detach(), x.data)
    x.add_(1)
    assert seen.written(0) is None
    assert seen.written(1) is x.untyped_storage()


def test_a_storage_that_others_let_go_is_freed_and_no_matter() -> None:
    with no_gc():
        x = torch.randn(8)
        seen, storage = watch(x.detach()), weakref.ref(x.untyped_storage())
        x.data.zero_()
        del x
        assert storage() is None
        assert seen.written(0) is None


def test_a_storage_that_lost_its_bytes_is_no_matter() -> None:
    x = torch.randn(8)
    seen = watch(x.detach())
    x.untyped_storage().resize_(0)
    assert seen.written(0) is None


def test_what_was_dropped_comes_back_as_it_was_saved() -> None:
    x, mask = torch.randn(64, 33, requires_grad=True), (torch.rand(64, 33) > 0.5).float()
    store = SavedTensorStore(uniquify=True)
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
