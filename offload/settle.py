"""From a saved tensor to its payload, in two steps: admitted at pack, settled once its operator has returned.

An operator may fill a tensor after it saved it (`rrelu` does), so pack takes a reference and the hash of the
bytes. Autograd's sequence number moves with every node: a later save under another number proves that the
operator has returned, and only then is content matched and encoded, provided that the bytes still have the
hash they had at pack. Where they do not, the tensor stays a reference, which is what plain autograd has.
"""

import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._autograd import _get_sequence_nr
from torch.utils._python_dispatch import _disable_current_modes

from offload.codecs.base import Codec
from offload.codecs.choose import encode_best
from offload.codecs.index_list import IndexLists
from offload.codecs.tensor_keyed import TensorKeyed
from offload.dedupe import ContentIndex, StorageIndex
from offload.digest import digest_of
from offload.handle import Content, Encoded, Entry, Handle, Kept, Reference
from offload.late import enter
from offload.layout import Layout, block_of, lift
from offload.ledger import Ledger
from offload.offers import Offers
from offload.own import copy_of, take_over
from offload.patience import Line
from offload.pending import Late, Pending, Queue, leave
from offload.references import References
from offload.select import is_readable
from offload.sharding.base import Sharding
from offload.share import Sharer
from offload.stats import Row


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
        self.storages = StorageIndex()
        self._contents = ContentIndex()
        self._lists = IndexLists(ledger)
        self.offers = Offers(self._lists.tensors)
        self.sharer = Sharer(sharding, ledger=ledger)
        self.queue = Queue()
        self.has_codecs = bool(codecs)
        offers = self.offers if codecs else None
        self.references = References(ledger=ledger, queue=self.queue, offers=offers, dedupe=dedupe)

    def begin_step(self) -> None:
        """Start counting storages and the peak anew, and look which ranks there are."""
        for save in self.queue.take_left():
            leave(save)
        self.storages.begin_step()
        self._lists.tensors.begin_step()
        self.sharer.begin_step()
        self._ledger.begin_step()

    def admit(self, tensor: Tensor, storage: torch.UntypedStorage, *, row: Row, line: Line) -> Handle | Kept:
        """Return the handle of a save of a plain tensor on `storage`."""
        references = self.references
        alias = tensor.detach()
        num_bytes = storage.nbytes()
        record = self.storages.find(storage)
        known = record.at(alias._version) if record is not None and self._dedupe else None
        if num_bytes < self._min_bytes:
            return references.keep(alias, storage, num_bytes=num_bytes, row=row)
        if record is None and line.is_late:
            return references.keep_late(alias, storage, num_bytes=num_bytes, row=row, line=line)
        # A storage that was read once is read again: its saves are to share one payload (Law 5).
        if self._dedupe and known is None and not line.reading.is_worth_trying():
            return references.keep(alias, storage, num_bytes=num_bytes, row=row)
        layout, source = lift(alias)
        if not is_readable(layout, num_bytes):
            return references.keep(alias, storage, num_bytes=num_bytes, row=row)
        digest = digest_of(source)
        if known is not None and isinstance(known.content, Reference):
            if known.digest in (None, digest):  # without one it stays a reference
                row.count("storage")
                return Handle(known, layout=layout, saver=known.content.add(source))
            known.follows = True
        if self._asks_for_keys(line):
            self.offers.offer_parameters(tensor)
        charge = references.charge(
            source, storage, storage_bytes=0 if self.storages.is_counted(record) else num_bytes
        )
        reference = Reference(source, num_bytes=num_bytes, charge=charge)
        entry = Entry(reference, line=line, digest=digest, follows=known is not None and known.follows)
        self.storages.put(entry, storage, version=source._version)
        pending = Pending(_get_sequence_nr(), weakref.ref(entry), layout, row, charge.claim, num_bytes)
        self.queue.put(pending)
        return Handle(entry, layout=layout)

    def _asks_for_keys(self, line: Line) -> bool:
        """Whether a codec may look for what was computed with the next save; no other than this one does."""
        asks = line.encoding.is_hopeful and (line.others.is_hopeful or line.codec == TensorKeyed.name)
        return self.has_codecs and asks

    def settle_returned(self) -> None:
        """Settle a batch of what this thread saved under an earlier node than the one being built.

        Not one by one: between two operators the caches are theirs, and each look at a tensor would cost
        several times what it does right after another one.
        """
        if self.queue.is_mine_due:
            self._settle_queue(now=_get_sequence_nr())
            self._share(is_final=False)

    def settle_all(self) -> None:
        """Settle all that this thread saved. To be called outside any operator."""
        if self.queue.num_saves:
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
        self._ledger.book()
        taken, waiting = deque[Pending | Late](), deque[Pending]()
        # A mode that was entered after the save (a fake tensor's, a counter's) has no part in it.
        with _disable_current_modes():
            try:
                # All late ones first: who has a storage is known once all its saves are.
                taken += self.queue.take(now=now)
                while taken:
                    pending: Pending | None = self._with_entry(taken[0])
                    taken.popleft()
                    if pending is not None:
                        waiting.append(pending)
                while waiting:
                    self._settle(waiting.popleft())
            finally:
                for save in (*waiting, *taken):  # after an error
                    leave(save)

    def _with_entry(self, save: Pending | Late) -> Pending | None:
        if isinstance(save, Pending):
            return save
        return enter(save, storages=self.storages, ledger=self._ledger)

    def drop_all(self) -> None:
        """Leave what this thread saved by reference."""
        self._ledger.book()
        for save in self.queue.take(now=None):
            leave(save)

    def _settle(self, pending: Pending) -> None:
        entry = pending.entry()
        if entry is None:
            leave(pending)
            return
        charged_bytes = self._ledger.charged_bytes
        stage = "reference"
        try:
            stage = self._place(entry, pending.layout)
        finally:
            won = stage != "reference"
            entry.line.reading.learn(won=won)
            entry.line.is_late = self._is_late(entry.line)
            own_bytes = self._ledger.charged_bytes - charged_bytes
            pending.row.count(stage, kept_bytes=own_bytes if won else pending.claim.added_bytes)
        if self._codecs:
            self.offers.offer_entry(entry, pending.layout, kept_bytes=pending.num_bytes)
        self.sharer.add(entry, layout=pending.layout, row=pending.row, stage=stage)

    def _is_late(self, line: Line) -> bool:
        """Whether the next save of the line is looked at only once its operator has returned."""
        return self._dedupe and line.is_sole and line.reading.is_winning and not self._asks_for_keys(line)

    def _place(self, entry: Entry, layout: Layout) -> str:
        """Give `entry` bytes of its own where a stage has a reason to, and return the name of the stage."""
        reference = entry.content
        if entry.follows or not isinstance(reference, Reference) or reference.is_stale:
            return "reference"
        source = reference.source
        # What nobody else has keeps its bytes, which plain autograd would read: no earlier hash is needed.
        entry.line.is_sole = reference.seal()
        is_unread = entry.line.is_sole and self._is_all_its_own(entry.line)
        if is_unread:
            stage = self._encode_unread(entry, reference, layout)
            if stage is not None:
                return stage
        if entry.line.is_sole:
            entry.digest = digest_of(source)
        if entry.digest is None:
            return "reference"
        stage, content = self._own_bytes(entry.digest, source, layout, entry.line, is_declined=is_unread)
        entry.line.matching.learn(won=stage == "content")
        if content is not None and not reference.is_sealed and digest_of(source) != entry.digest:
            entry.follows, content = True, None
        if self._dedupe and stage != "content" and not entry.follows:
            self._contents.put(entry, source)
        if content is None:
            return "reference"
        entry.own(content, watch=reference.watch(entry.digest))
        return stage

    def _is_all_its_own(self, line: Line) -> bool:
        """Whether a codec is sure to win on a save of the line, and no other save is likely to be equal."""
        return line.codec is not None and line.encoding.is_winning and not line.matching.is_worth_trying()

    def _encode_unread(self, entry: Entry, reference: Reference, layout: Layout) -> str | None:
        """Encode what nobody else has, without a hash to find it by; None where no codec wins."""
        encoded = self._encode(reference.source, layout, entry.line)
        if encoded is None:
            return None
        if reference.is_sealed:
            entry.own(encoded[1], watch=None)
            if reference.is_sealed:
                return encoded[0]
        entry.own(reference, watch=None)  # another thread got the storage meanwhile
        entry.digest = None
        return "reference"

    def _own_bytes(
        self, digest: bytes, source: Tensor, layout: Layout, line: Line, *, is_declined: bool
    ) -> tuple[str, Content | None]:
        """Return bytes apart from the storage and the stage that has them; None where a reference will do."""
        shared = self._find_content(digest, source, layout) if self._dedupe else None
        if shared is not None:
            return "content", shared
        encoded = self._encode(source, layout, line) if not is_declined else None
        if encoded is not None:
            return encoded
        return (
            ("reference", None)
            if self._dedupe
            else ("copy", copy_of(source, layout, whole_storage=False, ledger=self._ledger))
        )

    def _find_content(self, digest: bytes, source: Tensor, layout: Layout) -> Content | None:
        """Return the content of a living entry with the same bytes; one kept by reference takes a copy of its
        own first.
        """
        known = self._contents.find(digest, source)
        if known is not None:
            for patience in (known.line.reading, known.line.matching):
                patience.learn(won=True)  # a line that finds nothing is worth reading to be found
        if known is not None and isinstance(known.content, Encoded):
            return known.content if known.content.is_fresh else None
        if known is None or not isinstance(known.content, Reference):
            return None
        theirs = known.content.source
        if known.follows or known.content.is_stale:
            return None
        reference, watch = known.content, known.content.watch(digest)
        was_sealed = reference.is_sealed
        if watch is not None:
            copy = copy_of(theirs, layout, whole_storage=True, ledger=self._ledger)
        else:
            copy = take_over(reference, digest=digest if was_sealed else None)
        # One hash: they still had these bytes, and no other thread wrote while they were copied.
        if any(part.digest != digest for part in copy.parts):
            return None
        known.own(copy, watch=watch)
        was_read = was_sealed and not reference.is_sealed
        if watch is None and (was_read or not reference.is_sole(num_payloads=1)):
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
