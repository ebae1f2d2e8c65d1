"""What autograd keeps, and the payload behind it.

A `Handle` is what autograd holds for one save; it owns its `Entry`, an entry owns one `Content`. The last
handle's end frees the payload by reference count; nothing else owns any of the three.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from offload.books import Claim
from offload.codecs.base import Payload
from offload.errors import RankMismatchError, StaleTensorError
from offload.layout import Layout, lay, lay_bytes, lay_on
from offload.ledger import Charge, Ledger
from offload.part import Part
from offload.patience import Line
from offload.reader import only_reads
from offload.sole import is_sole
from offload.watch import Watch


class Content(ABC):
    """One payload, however it is held."""

    __slots__ = ()
    lent: tuple[Layout, Tensor] | None = None
    """A tensor on the bytes of its own, with its layout, for those that only read."""

    @abstractmethod
    def open(self, layout: Layout, saver: int) -> Tensor:
        """Return what save number `saver` saved, with `layout`, any number of times (Law 3)."""


class Reference(Content):
    """The saved tensors themselves, one alias a save, each refused at unpack once it was changed in place
    (Law 4).

    Every save keeps an alias of its own because `x` and `x.data` share a storage and not a version counter.
    Owns the aliases, so the storage lives.
    """

    __slots__ = ("_charge", "_num_bytes", "_savers", "is_sealed")

    def __init__(
        self,
        source: Tensor,
        *,
        version: int | None = None,
        num_bytes: int = 0,
        charge: Charge | None = None,
    ) -> None:
        self.is_sealed = False
        """Whether nobody else had the storage when it was hashed last, nor got it from here since."""
        self._savers = [(source, source._version if version is None else version)]
        self._charge = charge
        self._num_bytes = num_bytes

    @property
    def source(self) -> Tensor:
        """The first alias."""
        return self._savers[0][0]

    @property
    def is_stale(self) -> bool:
        """Whether any of the saved tensors was changed in place, or lost its bytes, since it was saved."""
        return self._shrank or any(source._version != version for source, version in self._savers)

    @property
    def _shrank(self) -> bool:
        return self._num_bytes > 0 and self.source.untyped_storage().nbytes() < self._num_bytes

    def add(self, source: Tensor, *, version: int | None = None) -> int:
        """Take one more save of the same bytes, made at `version` (None: its own now); return its number."""
        self.is_sealed = False
        self._savers.append((source, source._version if version is None else version))
        return len(self._savers) - 1

    @property
    def charge(self) -> Charge | None:
        """What is charged for the storage."""
        return self._charge

    def is_sole(self, *, num_payloads: int = 0) -> bool:
        """Return whether nobody else has the storage, but so many payloads, as far as that can be told."""
        storage = self.source.untyped_storage()
        return is_sole(storage, num_aliases=len(self._savers) + num_payloads)

    def seal(self) -> bool:
        """Return whether nobody else has the storage; if so it is sealed, before it is hashed."""
        self.is_sealed = True  # first: a reader on another thread is either counted or breaks the seal
        if not self.is_sole():
            self.is_sealed = False
        return self.is_sealed

    def watch(self, digest: bytes) -> Watch | None:
        """Return what tells of writes behind the counters from now on; None where nobody else can write."""
        return None if self.is_sole() else Watch(self._savers, digest=digest)

    def open(self, layout: Layout, saver: int) -> Tensor:
        """Return the tensor; raises StaleTensorError when it is no longer what was saved."""
        source, version = self._savers[saver]
        require_fresh(source, version=version, num_bytes=self._num_bytes)
        # An alias of the reader's own: autograd may hand out what it gets, and `is_sole` counts aliases.
        alias = source.detach()
        self.is_sealed = False  # before the reader can write to it
        return lay(layout, alias)


class Encoded(Content):
    """Bytes of the store's own, as `block_of` took them. Owns payload and charge."""

    __slots__ = ("__weakref__", "_charge", "_payload", "_start", "lent")
    _charge: Charge | None

    def __init__(self, payload: Payload, *, start: int | None, charge: Charge | None) -> None:
        self._payload = payload
        self._start = start
        self._charge = charge
        self.lent = None

    def open(self, layout: Layout, saver: int) -> Tensor:
        """Decode the payload and lay the tensor on it."""
        payload = self._payload
        is_lent = payload.can_lend and only_reads()
        return lay_bytes(layout, payload.lend() if is_lent else payload.decode(), start=self._start)

    @property
    def is_fresh(self) -> bool:
        """Whether the payload can be decoded."""
        return self._payload.is_fresh

    @property
    def parts(self) -> Sequence[Part]:
        """The tensors of the payload."""
        return self._payload.parts

    def recharge(self, ledger: Ledger) -> None:
        """Charge anew after parts came to be shared, or shared with more ranks."""
        self.lent = None
        self._charge = None  # first: its key is the identity of a storage that may be gone
        self._charge = ledger.charge(self._payload.num_bytes)


class Entry:
    """One payload, shared by the handles of all views of one storage at one version. `line` is the one that
    saved it first.

    `digest` is that of the storage's bytes at pack, None if they were not read. `follows` marks a storage
    that was seen to be written behind its version counter: the entry then stays a reference, and its tensors
    follow the storage as they do in plain autograd. `watch` tells whether that happened after the entry got
    bytes of its own.
    """

    __slots__ = ("__weakref__", "content", "digest", "follows", "line", "watch")

    def __init__(
        self, content: Content, *, line: Line, digest: bytes | None = None, follows: bool = False
    ) -> None:
        self.content = content
        self.line = line
        self.digest = digest
        self.follows = follows
        self.watch: Watch | None = None

    def own(self, content: Content, *, watch: Watch | None) -> None:
        """Hold bytes apart from the storage that was saved, which `watch` watches."""
        self.content = content
        self.watch = watch


class Handle:
    """What autograd keeps for one save. Owns a share of its entry."""

    __slots__ = ("_entry", "_layout", "_saver")

    def __init__(self, entry: Entry, *, layout: Layout, saver: int = 0) -> None:
        self._entry = entry
        self._layout = layout
        self._saver = saver

    @property
    def is_reference(self) -> bool:
        """Whether the bytes are still those of the saved tensor."""
        return isinstance(self._entry.content, Reference)

    def open(self) -> Tensor:
        """Return the saved tensor as it was saved, or raise StaleTensorError or RankMismatchError."""
        watch, lent = self._entry.watch, self._entry.content.lent
        # Here and not with the content: called between the operators of backward, with cold caches.
        if lent is not None and watch is None and lent[0] == self._layout and only_reads():
            return lent[1]
        written = watch.written() if watch is not None else None
        if written is not None:
            with _disable_current_modes():
                return lay_on(self._layout, written)
        return self.open_own()

    def open_own(self) -> Tensor:
        """Return it as it was saved also where the storage that others have was written blindly."""
        entry = self._entry
        try:
            while True:
                content = entry.content
                opened = content.open(self._layout, self._saver)
                # Another thread may have taken the storage over before the reader's alias of it was counted.
                if entry.content is content:
                    return opened
        except RankMismatchError as error:
            raise RankMismatchError(
                f"backward needs a saved tensor of shape {tuple(self._layout.shape)}, {self._layout.dtype}, "
                f"that this rank shares with others, but {error}"
            ) from error


class Kept:
    """What autograd keeps for a save that stays by reference and shares no payload: most saves of most steps.

    Owns the alias, so the storage lives; the store's ledger knows it as a holder of that.
    """

    # No __init__, which would be one more entry from C to Python with cold caches: `kept_of` makes it.
    __slots__ = ("__weakref__", "_charge", "_handle", "_is_late", "_num_bytes", "alias", "claim", "version")
    alias: Tensor | None
    """The saved tensor, None once a handle has it."""
    claim: Claim | None
    _charge: Charge | None
    _handle: Handle | None
    _is_late: bool
    _num_bytes: int
    version: int

    @property
    def is_reference(self) -> bool:
        """Whether the bytes are still those of the saved tensor."""
        return self._handle is None or self._handle.is_reference

    def hold(self, handle: Handle) -> None:
        """Leave a late save, one to be looked at once its operator has returned, to a handle."""
        self._handle = handle
        self.alias = None

    def open(self) -> Tensor:
        """Return the saved tensor; raises StaleTensorError when it is no longer what was saved."""
        alias, handle = self.alias, self._handle
        if alias is None or handle is not None:
            assert handle is not None
            return handle.open()
        if alias._version != self.version or (
            self._num_bytes and alias.untyped_storage().nbytes() < self._num_bytes
        ):
            require_fresh(alias, version=self.version, num_bytes=self._num_bytes)
        if not self._is_late:
            return alias
        # Of the reader's own, as in Reference: a thread that settles the save meanwhile must not miss it.
        opened = alias.detach()
        return opened if self._handle is None else self.open()

    def open_own(self) -> Tensor:
        """Return it as it was saved also where the storage that others have was written blindly."""
        return self._handle.open_own() if self._handle is not None else self.open()


def kept_of(
    alias: Tensor, *, num_bytes: int = 0, charge: Charge | None = None, is_late: bool = False
) -> Kept:
    """Return the keeper of `alias`, on a storage of `num_bytes`, 0 if that may go and come (FSDP's do)."""
    kept = Kept()
    kept.alias = alias
    kept.claim = None
    kept.version = alias._version
    kept._num_bytes = num_bytes
    kept._charge = charge
    kept._handle = None
    kept._is_late = is_late
    return kept


def require_fresh(alias: Tensor, *, version: int, num_bytes: int) -> None:
    """Raise StaleTensorError if `alias` was changed in place since `version`, or lost bytes (Law 4)."""
    shrank = num_bytes > 0 and alias.untyped_storage().nbytes() < num_bytes
    if not shrank and alias._version == version:
        return
    if shrank:
        now = alias.untyped_storage().nbytes()
        seen = f"its storage has {now} bytes now and had {num_bytes} when it was saved"
    else:
        seen = f"it is at version {alias._version} and was saved at version {version}"
    raise StaleTensorError(
        f"backward needs a saved tensor of shape {tuple(alias.shape)}, {alias.dtype}, kept by reference, but "
        f"{seen}: it was changed in place after it was saved. Change a clone instead, or move the change (an "
        "optimizer step, an in-place operation) behind backward."
    )
