"""Law 8, unhurried release: freeing never blocks, raises, or takes a lock that is held around a put."""

import gc
import queue
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from offload import SavedTensorStore
from offload.codecs.base import Block, Codec, Payload
from offload.codecs.index_list import IndexLists
from offload.codecs.raw import Raw
from tests.laws.settings import STORES

LIMIT_SECONDS = 60  # of a wait that only a deadlock reaches


class Calling(Codec):
    """Copies, and calls a function first, while the store is at its most occupied."""

    __slots__ = ("_call",)

    name = "calling"

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call

    def estimate_bytes(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> int | None:
        return 0

    def encode(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> Payload | None:
        self._call()
        return Raw().encode(block, limit_bytes=block.num_bytes, lists=lists)


def graph(store: SavedTensorStore) -> Tensor:
    x = torch.randn(60, 70, requires_grad=True)
    with store:
        return ((x.sin() * x.sign()).exp() * x.t().clone().t()).sum()


def test_a_graph_is_freed_while_another_thread_encodes() -> None:
    """The other thread sits inside the store, with whatever it locks, until the graph is gone."""
    inside, freed = threading.Event(), threading.Event()
    waits: list[bool] = []

    def wait() -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            waits.append(freed.wait(LIMIT_SECONDS))

    store = SavedTensorStore(uniquify=[Calling(wait)], min_bytes=0)
    loss = graph(store)
    other = threading.Thread(target=graph, args=(store,))
    other.start()
    assert inside.wait(LIMIT_SECONDS)
    del loss
    freed.set()
    other.join(LIMIT_SECONDS)
    assert not other.is_alive()
    assert waits
    assert all(waits)
    assert store.stats.held_bytes == 0


def test_backward_runs_while_another_thread_encodes() -> None:
    """Nor does unpack wait for a put."""
    inside, done = threading.Event(), threading.Event()
    waits: list[bool] = []

    def wait() -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            waits.append(done.wait(LIMIT_SECONDS))

    store = SavedTensorStore(uniquify=[Calling(wait)], min_bytes=0)
    loss = graph(store)
    other = threading.Thread(target=graph, args=(store,))
    other.start()
    assert inside.wait(LIMIT_SECONDS)
    loss.backward()
    done.set()
    other.join(LIMIT_SECONDS)
    assert all(waits)
    assert not other.is_alive()


def test_a_graph_is_freed_in_the_middle_of_a_pack() -> None:
    """The same thread frees while it encodes: a lock that is not re-entrant would never come back."""
    graphs: list[Tensor] = []
    store = SavedTensorStore(uniquify=[Calling(graphs.clear)], min_bytes=0)
    for _ in range(5):
        graphs += [graph(SavedTensorStore(min_bytes=0)), graph(store)]
    graphs.clear()
    assert store.stats.held_bytes == 0


def test_the_collector_frees_a_graph_in_the_middle_of_a_pack() -> None:
    def cycle() -> None:
        ring: list[object] = [graph(store)]
        ring.append(ring)

    collect = [False]
    store = SavedTensorStore(uniquify=[Calling(lambda: collect[0] and gc.collect(0))], min_bytes=0)
    for _ in range(5):
        collect[0] = False
        cycle()
        collect[0] = True
        graph(store)
    gc.collect()
    assert store.stats.held_bytes == 0


def test_freeing_raises_nothing(store: SavedTensorStore, *, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a destructor raises goes to this hook and nowhere else."""
    seen: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    losses = [graph(store) for _ in range(4)]
    threads = [threading.Thread(target=losses.pop) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_SECONDS)
    del store
    losses.clear()
    assert not seen


@pytest.mark.parametrize("name", sorted(STORES))
def test_threads_that_free_what_others_save_lose_no_byte(name: str) -> None:
    """Three threads save into one store, three others drop the graphs."""
    store = STORES[name]()
    losses: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()

    def drop() -> None:
        while losses.get(timeout=LIMIT_SECONDS) is not None:
            pass

    def save() -> None:
        for _ in range(6):
            losses.put(graph(store))

    droppers, savers = ([threading.Thread(target=each) for _ in range(3)] for each in (drop, save))
    for thread in droppers + savers:
        thread.start()
    for thread in savers:
        thread.join(LIMIT_SECONDS)
    for _ in droppers:
        losses.put(None)
    for thread in droppers:
        thread.join(LIMIT_SECONDS)
    assert store.stats.held_bytes == 0
