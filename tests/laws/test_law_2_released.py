"""Law 2, released: nothing is held once the graph is gone, without gc wherever PyTorch needs none."""

import gc
import weakref
from collections import Counter
from itertools import product

import pytest
import torch
from torch import Tensor

from offload import SavedTensorStore
from offload.books import Claim
from offload.codecs.base import Payload
from offload.codecs.index_list import IndexList
from offload.codecs.key import Key
from offload.handle import Content, Entry, Handle
from offload.ledger import Charge
from tests.laws.graphs import GRAPHS
from tests.laws.settings import no_gc

ENDS = ("backward", "dropped", "backward inside", "second backward", "exception")
KINDS = (Handle, Entry, Content, Payload, IndexList, Key, Charge, Claim)


def num_alive() -> Counter[str]:
    """Count the objects that a store makes."""
    return Counter(type(each).__name__ for each in gc.get_objects() if issubclass(type(each), KINDS))


def test_held_bytes_are_zero_and_no_object_is_left(store: SavedTensorStore) -> None:
    with no_gc():
        before = num_alive()
        for end, build in product(ENDS, GRAPHS.values()):
            finish(store, build, end=end)
            assert store.stats.held_bytes == 0, (build.__name__, end)
        assert num_alive() == before
    assert store.stats.peak_held_bytes > 0


def finish(store: SavedTensorStore, build: object, *, end: str) -> None:
    """Build a graph and end it."""
    try:
        with store:
            loss, leaves = build()
            if end == "backward inside":
                loss.backward()
            if end == "exception":
                raise ArithmeticError
    except ArithmeticError:
        return
    assert end == "backward inside" or store.stats.held_bytes > 0 or store.stats.saved_bytes < 4096
    if end == "second backward":
        torch.autograd.grad(loss, leaves, retain_graph=True)
    if end in ("backward", "second backward"):
        loss.backward()


def test_entries_go_node_by_node(store: SavedTensorStore) -> None:
    """Backward frees each tensor once its node has run: the peak of memory falls while backward goes on."""
    held: list[int] = []
    hidden = weight = torch.ones(3000, requires_grad=True)
    with store, no_gc():
        for number in range(6):
            hidden = hidden * torch.randn(3000) if number % 2 else hidden * torch.randn(3000).sign()
            hidden.register_hook(lambda gradient: held.append(store.stats.held_bytes))
    hidden.sum().backward()
    assert weight.grad is not None
    assert held == sorted(held, reverse=True)
    assert len(set(held)) == 6


def test_an_exception_in_the_middle_of_forward_leaves_nothing(store: SavedTensorStore) -> None:
    def forward(x: Tensor) -> Tensor:
        y = (x.exp() * x.sign()).sin()
        raise ArithmeticError(f"after {len(y)} rows were saved")

    with no_gc():
        for _ in range(3):
            with pytest.raises(ArithmeticError), store:
                forward(torch.randn(70, 60, requires_grad=True))
            assert store.stats.held_bytes == 0


def test_an_exception_in_backward_leaves_nothing_once_the_graph_is_dropped(store: SavedTensorStore) -> None:
    x = torch.randn(70, 60, requires_grad=True)

    def refuse(gradient: Tensor) -> None:
        raise ArithmeticError

    with store:
        y = x.exp()
        y.register_hook(refuse)
        loss = y.sin().sum()
    with pytest.raises(ArithmeticError):
        loss.backward()
    with no_gc():
        del y, loss
        assert store.stats.held_bytes == 0


def test_the_storages_go_with_the_graph(store: SavedTensorStore) -> None:
    """Not only the bookkeeping: a storage that was saved is freed with the last handle."""
    x = torch.randn(70, 60)
    twin = x.clone()
    storages = [weakref.ref(each.untyped_storage()) for each in (x, twin)]
    narrow = torch.ones(60, 70, requires_grad=True)
    weight = torch.ones(70, 60, requires_grad=True)
    with no_gc():
        with store:
            loss = (weight * x + weight * twin).sum() + (narrow * x.t()).sum()
        del x, twin
        loss.backward()
        del loss
        assert [storage() for storage in storages] == [None, None]


def test_a_tensor_that_is_its_own_saved_output_makes_no_cycle(store: SavedTensorStore) -> None:
    """`exp` saves what it returns: kept as it is, it would tie the node to itself for ever."""
    with no_gc():
        x = torch.randn(5000, requires_grad=True)
        with store:
            y = x.exp().sigmoid().softmax(0).tanh()
        storage = weakref.ref(y.untyped_storage())
        del y
        assert storage() is None
        assert store.stats.held_bytes == 0


def test_second_derivatives_leave_nothing(store: SavedTensorStore) -> None:
    """`create_graph` through `autograd.grad`; through `backward` PyTorch itself makes a cycle."""
    with no_gc():
        x = torch.randn(70, 60, requires_grad=True)
        with store:
            y = (x.sin() * x.exp()).sum()
            (first,) = torch.autograd.grad(y, x, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
        assert store.stats.held_bytes > 0
        del y, first, second
        assert store.stats.held_bytes == 0


def test_a_store_that_is_gone_is_freed_while_its_graph_lives_on() -> None:
    """Handles own what they need: the graph outlives the store's own name."""
    x = torch.randn(70, 60, requires_grad=True)
    with SavedTensorStore(uniquify=True) as store:
        loss = (x.sign() * x * torch.ones(70, 60)).exp().sum()
    del store
    gc.collect()
    loss.backward()
    assert torch.equal(x.grad, x.detach().sign() * x.detach().abs().exp())
