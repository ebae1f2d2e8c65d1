"""The store that a job's ranks met through, asked with an end to every wait."""

import queue
import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

_Answer = TypeVar("_Answer")
_Question = tuple[Callable[[], object], "queue.SimpleQueue[object]"]


class JobStore:
    """Names and bytes that all ranks of a job see.

    Asked on a thread of its own, over a connection of its own: a call into torch's store cannot be broken
    off when the process at its other end has stopped. Owns both; its end lets them go.

    Args:
        prefix: before each name.
        timeout_seconds: for an answer. Without one in time the store is lost, and every later call fails.

    Raises:
        RuntimeError: from each method, when the store is lost or refuses.
    """

    def __init__(self, prefix: str, *, timeout_seconds: float) -> None:
        store: Store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self._store = PrefixStore(prefix, store)
        self._timeout_seconds = timeout_seconds
        self._is_lost = False
        self._questions: queue.SimpleQueue[_Question | None] = queue.SimpleQueue()
        threading.Thread(target=_answer, args=(self._questions,), daemon=True).start()
        weakref.finalize(self, self._questions.put, None)

    def below(self, prefix: str) -> PrefixStore:
        """Return a store for a process group to meet through."""
        return PrefixStore(prefix, self._store)

    def get(self, name: str) -> bytes | None:
        """Return what was set or appended, None if nothing was."""
        return self._ask(lambda: bytes(self._store.get(name)) if self._store.check([name]) else None)

    def set(self, name: str, value: str) -> None:
        """Set a value."""
        self._ask(lambda: self._store.set(name, value))

    def count(self, name: str) -> int:
        """Add one to a number, and return it."""
        return self._ask(lambda: int(self._store.add(name, 1)))

    def append(self, name: str, value: str) -> bytes:
        """Append, and return all that was appended by any rank."""

        def append() -> bytes:
            self._store.append(name, value)  # type: ignore[attr-defined]
            return bytes(self._store.get(name))

        return self._ask(append)

    def tell(self, name: str, value: str) -> None:
        """Append, and do not wait for it; where the store is lost, nothing is told."""
        self._questions.put((lambda: self._store.append(name, value), queue.SimpleQueue()))  # type: ignore[attr-defined]

    def remove(self, name: str) -> None:
        """Remove a value, if the kind of store can."""
        self._ask(lambda: self._store.delete_key(name))

    def _ask(self, call: Callable[[], _Answer]) -> _Answer:
        if self._is_lost:
            raise RuntimeError("it did not answer before")
        answers: queue.SimpleQueue[_Answer | RuntimeError] = queue.SimpleQueue()
        self._questions.put((call, answers))  # type: ignore[arg-type]
        try:
            answer = answers.get(timeout=self._timeout_seconds)
        except queue.Empty:
            self._is_lost = True
            raise RuntimeError(f"it did not answer within {self._timeout_seconds:g} s") from None
        if isinstance(answer, RuntimeError):
            raise answer
        return answer


def _answer(questions: "queue.SimpleQueue[_Question | None]") -> None:
    while (question := questions.get()) is not None:
        call, answers = question
        try:
            answers.put(call())
        except RuntimeError as error:
            answers.put(error)
        del question, call, answers  # the end of the store may wait for them
