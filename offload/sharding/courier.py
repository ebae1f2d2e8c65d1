"""A thread that comes to gathers for which another rank waits while this one is busy elsewhere.

Ranks that save in orders of their own also read in those. One may be in a collective of the model, waiting
for a rank that waits for it in a gather: without the thread neither would ever go on.
"""

import queue
import threading
import weakref
from typing import Protocol


class Served(Protocol):
    """Gathers that may be waited for."""

    def serve(self) -> bool:
        """Come to those that another rank waits for; return whether there may be more."""


def serve(gathers: Served, *, every_seconds: float) -> None:
    """Let `gathers` serve now and then until they are done, or nobody holds them any more."""
    ends: queue.SimpleQueue[None] = queue.SimpleQueue()
    weakref.finalize(gathers, ends.put, None)
    threading.Thread(target=_serve, args=(weakref.ref(gathers), ends, every_seconds), daemon=True).start()


def _serve(gathers: "weakref.ref[Served]", ends: "queue.SimpleQueue[None]", every_seconds: float) -> None:
    while not _has_ended(ends, seconds=every_seconds):
        living = gathers()
        if living is None or not living.serve():
            return
        del living


def _has_ended(ends: "queue.SimpleQueue[None]", *, seconds: float) -> bool:
    try:
        ends.get(timeout=seconds)
    except queue.Empty:
        return False
    return True
