"""What autograd keeps, and the payload behind it.

A `Handle` is what autograd holds for one save; it owns its `Entry`, an entry owns one `Content`. The last
handle's end frees the payload by reference count; nothing else owns any of the three.
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
    def open(self, layout: Layout | None, saver: int) -> Tensor:
        """Return what save number `saver` saved, with `layout`, any number of times (Law 3)."""


class Reference(Content):
    """The saved tensors themselves, one alias a save, each refused at unpack once it was changed in place
    (Law 4).

    Every save keeps an alias of its own because `x` and `x.data` share a storage and not a version counter.
    Owns the aliases, so the storage lives.
    """

    __slots__ = ("_charge", "_num_bytes", "_savers")

    def __init__(self, source: Tensor, *, num_bytes: int = 0, charge: Charge | None = None) -> None:
        self._savers = [(source, _version_of(source))]
        self._charge = charge
        self._num_bytes = num_bytes

    @property
    def source(self) -> Tensor:
        """The first alias."""
        return self._savers[0][0]

    @property
    def is_stale(self) -> bool:
        """Whether any of the saved tensors was changed in place, or lost its bytes, since it was saved."""
        return self._shrank or any(_version_of(source) != version for source, version in self._savers)

    @property
    def _shrank(self) -> bool:
        return self._num_bytes > 0 and self.source.untyped_storage().nbytes() < self._num_bytes

    def add(self, source: Tensor) -> int:
        """Take one more save of the same bytes; return its number."""
        self._savers.append((source, _version_of(source)))
        return len(self._savers) - 1

    def open(self, layout: Layout | None, saver: int) -> Tensor:
        """Return the tensor; raises StaleTensorError when it is no longer what was saved."""
        source, version = self._savers[saver]
        if _version_of(source) != version or self._shrank:
            raise StaleTensorError(self._complaint(source, version))
        return source if layout is None else lay(layout, source)

    def _complaint(self, source: Tensor, version: int) -> str:
        if self._shrank:
            now = source.untyped_storage().nbytes()
            seen = f"its storage has {now} bytes now and had {self._num_bytes} when it was saved"
        else:
            seen = f"it is at version {_version_of(source)} and was saved at version {version}"
        return (
            f"backward needs a saved tensor of shape {tuple(source.shape)}, {source.dtype}, kept by "
            f"reference, but {seen}: it was changed in place after it was saved. Change a clone instead, or "
            "move the change (an optimizer step, an in-place operation) behind backward."
        )


class Encoded(Content):
    """Bytes of the store's own, as `block_of` took them. Owns payload and charge."""

    __slots__ = ("_charge", "_payload", "_start")

    def __init__(self, payload: Payload, *, start: int | None, charge: Charge) -> None:
        self._payload = payload
        self._start = start
        self._charge = charge

    def open(self, layout: Layout | None, saver: int) -> Tensor:
        """Decode the payload and lay the tensor on it."""
        assert layout is not None, "only a plain tensor is encoded, and it has a layout"
        return lay_bytes(layout, self._payload.decode(), start=self._start)


class Entry:
    """One payload, shared by the handles of all views of one storage at one version.

    `digest` is that of the storage's bytes at pack, None if they were not read. `follows` marks a storage
    that was seen to be written behind its version counter: the entry then stays a reference, and its tensors
    follow the storage as they do in plain autograd.
    """

    __slots__ = ("__weakref__", "content", "digest", "follows")

    def __init__(self, content: Content, *, digest: bytes | None = None, follows: bool = False) -> None:
        self.content = content
        self.digest = digest
        self.follows = follows


class Handle:
    """What autograd keeps for one save. Owns a share of its entry."""

    __slots__ = ("_entry", "_layout", "_saver")

    def __init__(self, entry: Entry, *, layout: Layout | None = None, saver: int = 0) -> None:
        self._entry = entry
        self._layout = layout
        self._saver = saver

    def open(self) -> Tensor:
        """Return the saved tensor as it was saved, or raise StaleTensorError."""
        return self._entry.content.open(self._layout, self._saver)


def _version_of(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
