"""Saves that wait: in order, each thread's by itself, until there is a batch."""

import threading
import weakref

import torch

from offload.handle import kept_of
from offload.ledger import Ledger
from offload.patience import Line
from offload.pending import BATCH_BYTES, LEAST_BYTES, Late, Queue
from offload.stats import Row


def late(sequence: int, *, num_bytes: int = 1 << 16) -> Late:
    """Return a save that waits, under node number `sequence`."""
    kept = kept_of(torch.ones(()))
    row = Row("here", shape=(), dtype=torch.float32)
    claim = Ledger().claim(kept, key=1, num_bytes=num_bytes, storage_bytes=num_bytes)
    return Late(sequence, weakref.ref(kept), row, Line(), claim, num_bytes)


def sequences(queue: Queue, *, now: int | None) -> list[int]:
    """Take, and return the numbers of the nodes."""
    return [save.sequence for save in queue.take(now=now)]


def test_what_the_running_node_saved_waits_on() -> None:
    queue = Queue()
    for sequence in (3, 4, 4, 7, 8, 8):
        queue.put(late(sequence))
    assert sequences(queue, now=8) == [3, 4, 4, 7]
    assert sequences(queue, now=8) == []
    queue.put(late(8))
    assert queue.num_saves == 3
    assert sequences(queue, now=9) == [8, 8, 8]
    assert queue.num_saves == 0


def test_each_thread_takes_its_own() -> None:
    queue = Queue()
    queue.put(late(1))
    taken: list[int] = []

    def other() -> None:
        queue.put(late(1))
        queue.put(late(2))
        taken.extend(sequences(queue, now=None))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert taken == [1, 2]
    assert sequences(queue, now=None) == [1]


def test_a_batch_is_so_many_bytes_or_saves() -> None:
    queue = Queue()
    assert queue.room_bytes == BATCH_BYTES
    queue.put(late(1, num_bytes=BATCH_BYTES))
    assert (queue.room_bytes, queue.is_mine_due) == (0, False)
    queue.put(late(1, num_bytes=1))
    assert (queue.room_bytes, queue.is_mine_due) == (-LEAST_BYTES, True)
    queue.take(now=None)
    assert (queue.room_bytes, queue.is_mine_due) == (BATCH_BYTES, False)
    for _ in range(BATCH_BYTES // LEAST_BYTES + 1):
        queue.put(late(1, num_bytes=0))
    assert queue.is_mine_due


def test_another_threads_batch_leaves_no_room_and_is_not_this_ones() -> None:
    queue = Queue()
    thread = threading.Thread(target=lambda: queue.put(late(1, num_bytes=2 * BATCH_BYTES)))
    thread.start()
    thread.join()
    assert (queue.room_bytes, queue.is_mine_due) == (-BATCH_BYTES, False)
    assert queue.take(now=None) == []
    assert [save.sequence for save in queue.take_left()] == [1]
    assert (queue.room_bytes, queue.num_saves) == (BATCH_BYTES, 0)
