"""What autograd keeps, and the payload behind it.

A `Handle` is what autograd holds for one save; it owns its `Entry`, an entry owns one `Content`. The last handle's end frees the
payload by reference count; nothing else owns any of the three.
"""

from abc import ABC, abstractmethod

from torch import Tensor

from offload.codecs.base import Payload
from offload.errors import StaleTensorError
from offload.layout import Layout, lay, lay_bytes
from offload.stats import Charge


class Content(ABC):
    """One payload, however it is held."""

    __slots__ = ()

    @abstractmethod
    def open(self, layout: Layout | None) -> Tensor:
        """Return the saved tensor with `layout`, any number of times (Law 3)."""


class Reference(Content):
    """The saved tensor itself, refused at unpack once it was changed in place (Law 4). Owns the alias, so the storage lives."""

    __slots__ = ("_num_bytes", "_version", "charge", "source")

    def __init__(self, source: Tensor, *, num_bytes: int = 0, charge: Charge | None = None) -> None:
        self.source = source
        self.charge = charge
        self._num_bytes = num_bytes
        self._version = _version_of(source)

    @property
    def is_stale(self) -> bool:
        """Whether the tensor was changed in place, or lost its bytes, since it was saved."""
        return _version_of(self.source) != self._version or self._shrank

    @property
    def _shrank(self) -> bool:
        return self._num_bytes > 0 and self.source.untyped_storage().nbytes() < self._num_bytes

    def open(self, layout: Layout | None) -> Tensor:
        """Return the tensor; raises StaleTensorError when it is no longer what was saved."""
        if self.is_stale:
            raise StaleTensorError(self._complaint(layout))
        return self.source if layout is None else lay(layout, self.source)

    def _complaint(self, layout: Layout | None) -> str:
        shape, dtype = (layout.shape, layout.dtype) if layout else (self.source.shape, self.source.dtype)
        what = f"backward needs a saved tensor of shape {tuple(shape)}, {dtype}, kept by reference, but "
        if self._shrank:
            now = self.source.untyped_storage().nbytes()
            seen = f"its storage has {now} bytes now and had {self._num_bytes} when it was saved"
        else:
            seen = f"it is at version {_version_of(self.source)} and was saved at version {self._version}"
        return (
            f"{what}{seen}: it was changed in place after it was saved. Change a clone instead, or move the change "
            "(an optimizer step, an in-place operation) behind backward."
        )


class Encoded(Content):
    """Bytes of the store's own, from byte `start` of the storage they were taken from. Owns payload and charge."""

    __slots__ = ("_charge", "_payload", "_start")

    def __init__(self, payload: Payload, *, start: int, charge: Charge) -> None:
        self._payload = payload
        self._start = start
        self._charge = charge

    def open(self, layout: Layout | None) -> Tensor:
        """Decode the payload and lay the tensor on it."""
        assert layout is not None, "only a plain tensor is encoded, and it has a layout"
        return lay_bytes(layout, self._payload.decode(), start=self._start)


class Entry:
    """One payload, shared by the handles of all views of one storage at one version."""

    __slots__ = ("__weakref__", "content", "is_queued")

    def __init__(self, content: Content) -> None:
        self.content = content
        self.is_queued = False

    @property
    def is_reference(self) -> bool:
        """Whether the payload is still the saved tensor itself."""
        return isinstance(self.content, Reference)


class Handle:
    """What autograd keeps for one save. Owns a share of its entry."""

    __slots__ = ("_entry", "_layout")

    def __init__(self, entry: Entry, layout: Layout | None) -> None:
        self._entry = entry
        self._layout = layout

    def open(self) -> Tensor:
        """Return the saved tensor as it was saved, or raise StaleTensorError."""
        return self._entry.content.open(self._layout)


def _version_of(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
