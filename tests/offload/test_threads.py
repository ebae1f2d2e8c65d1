"""Threads: eight with a store each, eight in one store in turn, eight in one store at once."""

import threading
from collections.abc import Callable

import pytest
import torch

from offload import SavedTensorStore
from tests.laws.settings import STORES, bits, no_gc, plain

NUM_THREADS = 8


def step(around: object, *, number: int) -> bytes:
    """Run three steps of a graph of which the threads share some contents; return the gradients."""
    chance = torch.Generator().manual_seed(number)
    common = torch.linspace(-1, 1, 64 * 40).view(64, 40)
    x = torch.randn(64, 40, generator=chance).requires_grad_()
    for _ in range(3):
        with around:
            y = (x * common.clone()).exp() * x.sign() + (x.t() * common.t()).relu().t() * x
        y.square().sum().backward()
    return bits(x.grad)


def in_threads(work: Callable[[int], bytes]) -> list[bytes]:
    """Run `work` with each number in a thread of its own and return the results in order."""
    results: dict[int, bytes] = {}
    threads = [
        threading.Thread(target=lambda n=number: results.update({n: work(n)}))
        for number in range(NUM_THREADS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[number] for number in range(NUM_THREADS)]


@pytest.fixture(scope="module")
def expected() -> list[bytes]:
    return [step(plain(), number=number) for number in range(NUM_THREADS)]


@pytest.mark.parametrize("name", sorted(STORES))
def test_eight_threads_with_a_store_each(name: str, *, expected: list[bytes]) -> None:
    stores = [STORES[name]() for _ in range(NUM_THREADS)]
    with no_gc():
        assert in_threads(lambda number: step(stores[number], number=number)) == expected
        assert [store.stats.held_bytes for store in stores] == [0] * NUM_THREADS


@pytest.mark.parametrize("name", sorted(STORES))
def test_eight_threads_in_one_store_in_turn(name: str, *, expected: list[bytes]) -> None:
    store, turn = STORES[name](), threading.Lock()

    def work(number: int) -> bytes:
        with turn:
            return step(store, number=number)

    with no_gc():
        assert in_threads(work) == expected
        assert store.stats.held_bytes == 0


@pytest.mark.parametrize("name", sorted(STORES))
def test_eight_threads_in_one_store_at_once(name: str, *, expected: list[bytes]) -> None:
    store = STORES[name]()
    with no_gc():
        assert in_threads(lambda number: step(store, number=number)) == expected
        assert store.stats.held_bytes == 0


def test_a_graph_built_in_one_thread_runs_backward_in_another() -> None:
    store = SavedTensorStore(uniquify=True)
    x = torch.randn(64, 40, requires_grad=True)
    with store:
        loss = (x.sign() * x.exp()).sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert torch.equal(x.grad, x.detach().sign() * x.detach().exp())
    assert store.stats.held_bytes == 0


def test_a_thread_that_ends_inside_its_context_leaves_nothing() -> None:
    """It saved, never left the context, and its unsettled saves went with it."""
    store = SavedTensorStore(uniquify=True)

    def work() -> None:
        store.__enter__()
        torch.randn(64, 40, requires_grad=True).exp()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert store.stats.held_bytes == 0


def test_a_thread_saves_nothing_into_the_store_of_another() -> None:
    """Hooks belong to a thread."""
    with SavedTensorStore(min_bytes=0) as store:
        thread = threading.Thread(target=lambda: torch.randn(64, requires_grad=True).exp())
        thread.start()
        thread.join()
    assert store.stats.num_saved == 0
