"""From a saved tensor to its payload, in two steps: admitted at pack, settled once its operator has returned.

An operator may fill a tensor after it saved it (`rrelu` does), so pack takes a reference and the hash of the
bytes. Autograd's sequence number moves with every node: a later save under another number proves that the
operator has returned, and only then is content matched and encoded, provided that the bytes still have the
hash they had at pack. Where they do not, the tensor stays a reference, which is what plain autograd has.
"""

import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._autograd import _get_sequence_nr
from torch.utils._python_dispatch import _disable_current_modes

from offload.codecs.base import Codec
from offload.codecs.choose import encode_best
from offload.codecs.index_list import IndexLists
from offload.codecs.raw import RawPayload
from offload.codecs.tensor_keyed import TensorKeyed
from offload.dedupe import ContentIndex, StorageIndex
from offload.digest import digest_of
from offload.handle import Content, Encoded, Entry, Handle, Kept, Reference, kept_of
from offload.layout import Layout, block_of, lift
from offload.ledger import Charge, Claim, Ledger
from offload.offers import Offers
from offload.patience import Line
from offload.select import is_window
from offload.sharding.base import Sharding
from offload.share import Sharer
from offload.stats import Row

_BATCH_BYTES = 8 << 20
_BATCH_SAVES = 1024
"""Saves of so many bytes of storage, or so many of them, wait by reference before they are settled."""


class Pending(NamedTuple):
    """A save whose operator may still be running. Weak: a graph that is dropped takes its entries along."""

    sequence: int
    entry: "weakref.ref[Entry]"
    layout: Layout
    row: Row
    claim: Claim
    num_bytes: int


class Settler:
    """Gives every saved tensor its entry, and every entry its payload."""

    def __init__(
        self,
        codecs: Sequence[Codec],
        *,
        dedupe: bool,
        min_bytes: int,
        sharding: Sharding,
        ledger: Ledger,
    ) -> None:
        self._codecs = codecs
        self._dedupe = dedupe
        self._min_bytes = min_bytes
        self._ledger = ledger
        self._storages = StorageIndex()
        self._contents = ContentIndex()
        self._lists = IndexLists(ledger)
        self._offers = Offers(self._lists.tensors)
        self.sharer = Sharer(sharding, ledger=ledger)
        self._queue = _Queue()
        self.num_pending = 0
        """Saves of all threads that have not settled: mostly there are none, and no queue is looked at."""

    def begin_step(self) -> None:
        """Start counting storages and the peak anew, and look which ranks there are."""
        self._storages.begin_step()
        self._lists.tensors.begin_step()
        self.sharer.begin_step()
        self._ledger.begin_step()

    def admit(self, tensor: Tensor, storage: torch.UntypedStorage, *, row: Row, line: Line) -> Handle | Kept:
        """Return the handle of a save of a plain tensor on `storage`."""
        alias = tensor.detach()
        num_bytes = storage.nbytes()
        record = self._storages.find(storage)
        known = record.at(alias._version) if record is not None and self._dedupe else None
        # A storage that was read once is read again: its saves are to share one payload (Law 5).
        unread = self._dedupe and known is None and not line.reading.is_worth_trying()
        if unread or num_bytes < self._min_bytes:
            return self._keep(alias, storage, num_bytes=num_bytes, row=row)
        layout, source = lift(alias)
        # Where the storage was shrunk before the save, it would have to grow to be read.
        if layout.span()[1] > num_bytes or is_window(layout, storage_bytes=num_bytes):
            return self._keep(alias, storage, num_bytes=num_bytes, row=row)
        digest = digest_of(source)
        if known is not None and isinstance(known.content, Reference):
            if known.digest == digest:
                row.count("storage")
                return Handle(known, layout=layout, saver=known.content.add(source))
            known.follows = True
        # No other codec than this needs to hear of keys.
        asks = line.encoding.is_hopeful and (line.others.is_hopeful or line.codec == TensorKeyed.name)
        if self._codecs and asks:
            self._offers.offer_parameters(tensor)
        charge = self._charge(
            source, storage, storage_bytes=0 if self._storages.is_counted(record) else num_bytes
        )
        reference = Reference(source, num_bytes=num_bytes, charge=charge)
        entry = Entry(reference, line=line, digest=digest, follows=known is not None and known.follows)
        self._storages.put(entry, storage, version=source._version)
        pending = Pending(_get_sequence_nr(), weakref.ref(entry), layout, row, charge.claim, num_bytes)
        self._queue.pending.append(pending)
        self._queue.num_bytes += num_bytes
        self.num_pending += 1
        return Handle(entry, layout=layout)

    def keep(self, tensor: Tensor) -> Kept:
        """Return the handle of a parameter, or of what has no plain storage: no stage touches it, but others
        may be tables by it.
        """
        kept = kept_of(tensor.detach())
        if self._codecs:
            self._offers.offer_kept(kept, kept_bytes=0)
        return kept

    def settle_returned(self) -> None:
        """Settle a batch of what this thread saved under an earlier node than the one being built.

        Not one by one: between two operators the caches are theirs, and each look at a tensor would cost
        several times what it does right after another one.
        """
        if self._queue.num_bytes > _BATCH_BYTES or len(self._queue.pending) > _BATCH_SAVES:
            self._settle_queue(now=_get_sequence_nr())
            self._share(is_final=False)

    def settle_all(self) -> None:
        """Settle all that this thread saved. To be called outside any operator."""
        if self.num_pending:
            self._settle_queue(now=None)
        self._share(is_final=True)

    def _share(self, *, is_final: bool) -> None:
        with _disable_current_modes():
            self.sharer.share(is_final=is_final)

    def begin_backward(self) -> None:
        """Share what the ranks agreed on, before something is unpacked."""
        with _disable_current_modes():
            self.sharer.begin_backward()

    def _settle_queue(self, *, now: int | None) -> None:
        queue = self._queue.pending
        self._ledger.book()
        # A mode that was entered after the save (a fake tensor's, a counter's) has no part in it.
        with _disable_current_modes():
            while queue and queue[0].sequence != now:
                pending = queue.popleft()
                self.num_pending -= 1
                self._queue.num_bytes -= pending.num_bytes
                self._settle(pending)

    def drop_all(self) -> None:
        """Leave what this thread saved by reference."""
        self.num_pending -= len(self._queue.pending)
        self._queue.pending.clear()
        self._queue.num_bytes = 0

    def _keep(self, alias: Tensor, storage: torch.UntypedStorage, *, num_bytes: int, row: Row) -> Kept:
        if self._dedupe:
            kept = kept_of(alias, num_bytes=num_bytes)
            self._ledger.claim(kept, key=id(storage), num_bytes=num_bytes, storage_bytes=num_bytes, row=row)
        else:
            kept = kept_of(
                alias,
                num_bytes=num_bytes,
                charge=self._charge(alias, storage, storage_bytes=num_bytes, row=row),
            )
        if self._codecs:
            self._offers.offer_kept(kept, kept_bytes=num_bytes)
        return kept

    def _charge(
        self, alias: Tensor, storage: torch.UntypedStorage, *, storage_bytes: int, row: Row | None = None
    ) -> Charge:
        """Return the charge for a save by reference: its storage's, or without dedupe its own."""
        ledger = self._ledger
        if self._dedupe:
            return ledger.charge(storage.nbytes(), key=id(storage), storage_bytes=storage_bytes, row=row)
        charge = ledger.charge(min(lift(alias)[0].span_bytes(), alias.nbytes), row=row)
        ledger.claim(charge, key=id(storage), num_bytes=0, storage_bytes=storage_bytes)  # to be counted
        return charge

    def _settle(self, pending: Pending) -> None:
        entry = pending.entry()
        if entry is None:
            pending.row.count("reference", kept_bytes=pending.claim.added_bytes)
            return
        charged_bytes = self._ledger.charged_bytes
        stage = "reference"
        try:
            stage = self._place(entry, pending.layout)
        finally:
            won = stage != "reference"
            entry.line.reading.learn(won=won)
            own_bytes = self._ledger.charged_bytes - charged_bytes
            pending.row.count(stage, kept_bytes=own_bytes if won else pending.claim.added_bytes)
        if self._codecs:
            self._offers.offer_entry(entry, pending.layout, kept_bytes=pending.num_bytes)
        self.sharer.add(entry, layout=pending.layout, row=pending.row, stage=stage)

    def _place(self, entry: Entry, layout: Layout) -> str:
        """Give `entry` bytes of its own where a stage has a reason to, and return the name of the stage."""
        reference = entry.content
        if entry.follows or not isinstance(reference, Reference) or reference.is_stale:
            return "reference"
        source = reference.source
        stage, content = self._own_bytes(entry.digest or b"", source, layout, entry.line)
        if content is not None and digest_of(source) != entry.digest:
            entry.follows, content = True, None
        if self._dedupe and stage != "content" and not entry.follows:
            self._contents.put(entry, source)
        if content is None:
            return "reference"
        entry.own(content, watch=reference.watch(entry.digest or b""))
        return stage

    def _own_bytes(
        self, digest: bytes, source: Tensor, layout: Layout, line: Line
    ) -> tuple[str, Content | None]:
        """Return bytes apart from the storage and the stage that has them; None where a reference will do."""
        shared = self._find_content(digest, source, layout) if self._dedupe else None
        if shared is not None:
            return "content", shared
        encoded = self._encode(source, layout, line)
        if encoded is not None:
            return encoded
        return ("reference", None) if self._dedupe else ("copy", self._copy(source, layout))

    def _find_content(self, digest: bytes, source: Tensor, layout: Layout) -> Content | None:
        """Return the content of a living entry with the same bytes; one kept by reference takes a copy of its
        own first.
        """
        known = self._contents.find(digest, source)
        if known is not None:
            known.line.reading.learn(won=True)  # a line that finds nothing is worth reading to be found
        if known is not None and isinstance(known.content, Encoded):
            return known.content if known.content.is_fresh else None
        if known is None or not isinstance(known.content, Reference):
            return None
        theirs = known.content.source
        if known.follows or known.content.is_stale:
            return None
        reference, watch = known.content, known.content.watch(digest)
        copy = self._copy(theirs, layout) if watch is not None else self._take_over(reference, layout)
        # One hash: they still had these bytes, and no other thread wrote while they were copied.
        if any(part.digest != digest for part in copy.parts):
            return None
        known.own(copy, watch=watch)
        if watch is None and not reference.is_sole(num_payloads=1):
            # Another thread got the storage just before; whoever comes after that gets the copy.
            known.own(reference, watch=None)
            return None
        return copy

    def _encode(self, source: Tensor, layout: Layout, line: Line) -> tuple[str, Content] | None:
        if not self._codecs or not line.encoding.is_worth_trying():
            return None
        block, start = block_of(source, layout, whole_storage=self._dedupe)
        # The codec that won last is taken at once where the others never promised more.
        at_once = line.codec is not None and not line.others.is_worth_trying()
        found = encode_best(block, self._codecs, lists=self._lists, last=line.codec, at_once=at_once)
        line.encoding.learn(won=found is not None)
        if found is None:
            return None
        if not at_once or found[0] != line.codec:
            line.others.learn(won=found[0] != line.codec)
        line.codec, payload = found
        return line.codec, Encoded(payload, start=start, charge=self._ledger.charge(payload.num_bytes))

    def _copy(self, source: Tensor, layout: Layout) -> Encoded:
        block, start = block_of(source, layout, whole_storage=self._dedupe)
        charge = self._ledger.charge(block.num_bytes)
        return Encoded(RawPayload(block.flat.clone()), start=start, charge=charge)

    def _take_over(self, reference: Reference, layout: Layout) -> Encoded:
        """Return the storage of a reference as a payload: nobody else has it, and readers get copies."""
        block, start = block_of(reference.source, layout, whole_storage=True)
        return Encoded(RawPayload(block.flat), start=start, charge=reference.charge)


class _Queue(threading.local):
    """Autograd's sequence numbers are per thread, and so is the queue."""

    def __init__(self) -> None:
        self.pending: deque[Pending] = deque()
        self.num_bytes = 0
