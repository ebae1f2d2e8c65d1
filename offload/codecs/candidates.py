"""The living 16-bit tensors of a store, to try as the key of a new block."""

import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor

from offload.codecs.key import Keeper, Key, Reading, digest_of
from offload.errors import StoreError
from offload.ledger import Ledger

_NUM_TRIED = 4
"""Of one length; later ones take the place of earlier ones."""


class Candidate:
    """A saved 16-bit tensor and the order in which to read it. Weak: it goes with what autograd keeps."""

    __slots__ = ("_find", "_key", "_ledger", "_reading", "identity", "kept_bytes")

    def __init__(
        self,
        reading: Reading,
        *,
        identity: Hashable,
        find: Callable[[], Keeper | None],
        kept_bytes: int,
        ledger: Ledger,
    ) -> None:
        self._reading = reading
        self._find = find
        self._ledger = ledger
        self._key: weakref.ref[Key] | None = None
        self.identity = identity
        self.kept_bytes = kept_bytes

    @property
    def is_living(self) -> bool:
        """Whether autograd still keeps the tensor."""
        return self._find() is not None

    def at(self, places: Tensor) -> Tensor | None:
        """Return the elements at `places`, int64 `[S]`, as int16 `[S]`, or None if they cannot be had."""
        keeper = self._find()
        try:
            return self._reading.at(keeper, places) if keeper is not None else None
        except StoreError:
            return None

    def key(self) -> tuple[Key, Tensor] | None:
        """Return the tensor as a key, the one that living payloads have unless it changed, and its elements,
        int16 `[N]`; None if they cannot be had.
        """
        keeper = self._find()
        try:
            flat = self._reading.flat(keeper) if keeper is not None else None
        except StoreError:
            flat = None
        if keeper is None or flat is None:
            return None
        digest = digest_of(flat)
        key = self._key() if self._key is not None else None
        if key is None or key.digest != digest:
            key = Key(keeper, self._reading, flat=flat, digest=digest, ledger=self._ledger)
            self._key = weakref.ref(key)
        return key, flat


class Candidates:
    """The tensors that were saved last, by their number of elements. Holds them weakly."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._by_length: dict[tuple[int, torch.device], deque[Candidate]] = {}
        self.on_asked: Callable[[], None] | None = None
        """Called before candidates are returned; adds what is new."""

    def begin_step(self) -> None:
        """Forget what is gone."""
        for length, found in [*self._by_length.items()]:
            living = [each for each in found if each.is_living]
            if living:
                self._by_length[length] = deque(living, _NUM_TRIED)
            else:
                del self._by_length[length]

    def add(self, tensor: Tensor, *, find: Callable[[], Keeper | None], kept_bytes: int) -> None:
        """Take a saved tensor without graph that has plain storage, if it has 16 bits.

        Args:
            tensor: as it was saved.
            find: returns what autograd keeps for it, while it does.
            kept_bytes: what a payload would keep alive of it; 0 for a parameter, which is alive anyway.
        """
        if tensor.element_size() != 2 or tensor.is_neg() or not tensor.numel():
            return
        found = self._by_length.setdefault((tensor.numel(), tensor.device), deque(maxlen=_NUM_TRIED))
        for reading, identity in _readings(tensor):
            if not any(each.identity == identity and each.is_living for each in found):
                found.append(
                    Candidate(
                        reading, identity=identity, find=find, kept_bytes=kept_bytes, ledger=self._ledger
                    )
                )

    def of(self, num_rows: int, device: torch.device) -> list[Candidate]:
        """Return those with `num_rows` elements on `device`, the youngest first."""
        if self.on_asked is not None:
            self.on_asked()
        return [*self._by_length.get((num_rows, device), ())][::-1]


def _readings(tensor: Tensor) -> Iterator[tuple[Reading, Hashable]]:
    """Yield the orders to try, each with what tells it from others: as the elements lie on a dense storage,
    and as the dims count them.
    """
    shape, stride = tensor.shape, tensor.stride()
    reach = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    stop_bytes = (int(tensor.storage_offset()) + reach) * tensor.element_size()
    counted = tuple(range(tensor.ndim))
    where = (tensor.data_ptr(), tensor._version)
    if reach == tensor.numel():
        lying = tuple(sorted(counted, key=lambda dim: -stride[dim]))
        yield Reading(shape, tensor.dtype, lying, stop_bytes), where
    if not tensor.is_contiguous():
        yield Reading(shape, tensor.dtype, counted, stop_bytes), (where, shape, stride)
