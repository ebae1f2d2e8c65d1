"""Whether a tensor of which the store has bytes was written behind its counter where others still have it."""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from offload.digest import digest_of_storage


class Watch:
    """A storage of which the store keeps bytes of its own, weakly, and the counters of the tensors that were
    saved of it (Law 4).

    Plain autograd reads what was written behind the counter, so the store does, too: bytes as they were saved
    would make a right factor beside others that were written just so and kept by reference.
    """

    __slots__ = ("_counters", "_digest", "_num_bytes", "_storage")

    def __init__(self, savers: Sequence[tuple[Tensor, int]], *, digest: bytes) -> None:
        storage = savers[0][0].untyped_storage()
        self._storage = weakref.ref(storage)
        self._num_bytes = storage.nbytes()
        self._digest = digest
        self._counters = [(_counter_of(source), version) for source, version in savers]

    def written(self) -> torch.UntypedStorage | None:
        """Return the storage if it is alive with other bytes than were saved and no counter moved; None where
        what was saved is what to return.
        """
        storage = self._storage()
        if storage is None or storage.nbytes() != self._num_bytes or self._has_moved:
            return None
        return storage if digest_of_storage(storage) != self._digest else None

    @property
    def _has_moved(self) -> bool:
        # Any of them: what one counter saw is no blind write to those who saved by another one.
        return any(counter._version != version for counter, version in self._counters)


def _counter_of(source: Tensor) -> Tensor:
    """Return an empty tensor with the version counter of `source`: nothing of its storage stays alive."""
    counter = source.detach()
    counter.data = source.new_empty(0)
    return counter
