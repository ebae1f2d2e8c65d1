"""From a saved tensor to its payload, in two steps: admitted at pack, settled once its operator has returned.

An operator may fill a tensor after it saved it (`rrelu` does), so pack only takes a reference. Autograd's sequence number moves with
every node: a later save under another number proves that the operator has returned, and only then are bytes hashed and encoded.
"""

import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from offload.codecs.base import Codec
from offload.codecs.choose import encode_best
from offload.codecs.index_list import IndexLists
from offload.codecs.raw import RawPayload
from offload.dedupe import ContentIndex, StorageIndex, StorageRecord, digest_of
from offload.handle import Content, Encoded, Entry, Reference
from offload.layout import Layout, block_of
from offload.select import is_window
from offload.stats import Ledger, Row


class Pending(NamedTuple):
    """A save whose operator may still be running. Weak: a graph that is dropped takes its entries along."""

    sequence: int
    entry: "weakref.ref[Entry]"
    layout: Layout
    record: StorageRecord
    row: Row


class Settler:
    """Gives every saved tensor its entry, and every entry its payload."""

    def __init__(self, codecs: Sequence[Codec], *, dedupe: bool, min_bytes: int, ledger: Ledger) -> None:
        self._codecs = codecs
        self._dedupe = dedupe
        self._min_bytes = min_bytes
        self._ledger = ledger
        self._storages = StorageIndex(ledger)
        self._contents = ContentIndex()
        self._lists = IndexLists(ledger)
        self._queue = _Queue()

    def begin_step(self) -> None:
        """Start counting storages and the peak anew."""
        self._storages.begin_step()
        self._ledger.reset_peak()

    def admit(self, layout: Layout, source: Tensor, *, row: Row) -> tuple[Entry, int]:
        """Return the entry of a save and the bytes of its storage if this step had not saved it before, else 0."""
        record = self._storages.record(source.untyped_storage())
        storage_bytes = self._storages.count(record)
        worth_reading = self._is_worth_reading(layout, record)
        entry = record.entry(source._version) if self._dedupe else None
        if entry is not None and (entry.is_queued or not worth_reading):
            row.count("storage")
            return entry, storage_bytes
        if entry is None:
            charge = self._storages.charge(record) if self._dedupe else self._ledger.charge(layout.span_bytes())
            entry = Entry(Reference(source, num_bytes=record.num_bytes, charge=charge))
            record.put(entry, source._version)
        if worth_reading:
            entry.is_queued = True
            sequence = torch.autograd._get_sequence_nr()
            self._queue.pending.append(Pending(sequence, weakref.ref(entry), layout, record, row))
        else:
            row.count("reference")
        return entry, storage_bytes

    def settle_returned(self) -> None:
        """Settle what this thread saved under an earlier node than the one being built."""
        now = torch.autograd._get_sequence_nr()
        queue = self._queue.pending
        while queue and queue[0].sequence != now:
            self._settle(queue.popleft())

    def settle_all(self) -> None:
        """Settle all that this thread saved. To be called outside any operator."""
        queue = self._queue.pending
        while queue:
            self._settle(queue.popleft())

    def drop_all(self) -> None:
        """Leave what this thread saved by reference."""
        self._queue.pending.clear()

    def _is_worth_reading(self, layout: Layout, record: StorageRecord) -> bool:
        return record.num_bytes >= self._min_bytes and not is_window(layout.span_bytes(), storage_bytes=record.num_bytes)

    def _settle(self, pending: Pending) -> None:
        entry = pending.entry()
        if entry is None or not isinstance(entry.content, Reference) or entry.content.is_stale:
            pending.row.count("reference")
            return
        pending.row.count(self._place(entry, entry.content.source, pending))

    def _place(self, entry: Entry, source: Tensor, pending: Pending) -> str:
        """Give `entry` its payload and return the name of the stage that had one."""
        layout, record = pending.layout, pending.record
        if not self._dedupe:
            stage, entry.content = self._encode(source, layout) or ("copy", self._copy(source, layout))
            return stage
        digest = digest_of(source)
        stage = "content"
        content = self._find_shared(digest, source, layout)
        if content is None:
            # A version seen before with other bytes: somebody writes behind PyTorch's counter. The earlier saves have copies, so this
            # one must have one too, or a gradient would mix old bytes with new ones (Law 4).
            must_copy = record.copied_version == source._version
            stage, content = self._encode(source, layout) or ("copy", self._copy(source, layout) if must_copy else None)
            self._contents.put(digest, source, entry=entry)
        if content is None:
            return "reference"
        entry.content = content
        record.copied_version = source._version
        return stage

    def _find_shared(self, digest: bytes, source: Tensor, layout: Layout) -> Content | None:
        """Return the content of a living entry with the same bytes; one kept by reference takes a copy of its own first."""
        known = self._contents.find(digest, source)
        if known is None or not isinstance(known.content, Reference):
            return known.content if known is not None else None
        theirs = known.content.source
        # Written to since, behind the counter or not: its later saves share the reference and follow the storage, as in plain autograd.
        if known.content.is_stale or digest_of(theirs) != digest:
            return None
        self._storages.record(theirs.untyped_storage()).copied_version = theirs._version
        known.content = self._copy(source, layout)
        return known.content

    def _encode(self, source: Tensor, layout: Layout) -> tuple[str, Content] | None:
        if not self._codecs:
            return None
        block, start = block_of(source, layout, whole_storage=self._dedupe)
        found = encode_best(block, self._codecs, lists=self._lists)
        if found is None:
            return None
        name, payload = found
        return name, Encoded(payload, start=start, charge=self._ledger.charge(payload.num_bytes))

    def _copy(self, source: Tensor, layout: Layout) -> Content:
        block, start = block_of(source, layout, whole_storage=self._dedupe)
        return Encoded(RawPayload(block.flat.clone()), start=start, charge=self._ledger.charge(block.num_bytes))


class _Queue(threading.local):
    """Autograd's sequence numbers are per thread, and so is the queue."""

    def __init__(self) -> None:
        self.pending: deque[Pending] = deque()
