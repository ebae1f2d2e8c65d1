"""Whether a tensor of which the store has bytes was written behind its counter where others still have it."""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from offload.digest import digest_of


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

    def written(self, saver: int) -> torch.UntypedStorage | None:
        """Return the storage if it is alive with other bytes than were saved, and the counter of save number
        `saver` did not move; None where what was saved is what to return.
        """
        storage = self._storage()
        counter, version = self._counters[saver]
        if storage is None or counter._version != version or storage.nbytes() != self._num_bytes:
            return None
        alias = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        return storage if digest_of(alias) != self._digest else None


def _counter_of(source: Tensor) -> Tensor:
    """Return an empty tensor with the version counter of `source`: nothing of its storage stays alive."""
    counter = source.detach()
    counter.data = source.new_empty(0)
    return counter
