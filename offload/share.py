"""From a settled entry to bytes that several ranks hold once: tried when entries settle, at each later look,
and once more when backward begins.
"""

import weakref

from torch import Tensor

from offload.codecs.raw import RawPayload
from offload.digest import digest_of
from offload.handle import Content, Encoded, Entry, Reference
from offload.layout import Layout, block_of
from offload.ledger import Ledger
from offload.part import Part
from offload.patience import Line
from offload.sharding.base import MIN_BYTES, Sharding, Traffic
from offload.stats import Row

_NUM_TRIED = 4


class _Settled:
    """A settled entry, and its content once that is a payload, which other entries may come to share. Weak:
    the graph's end takes them along.
    """

    __slots__ = ("content", "entry", "is_shared", "layout", "line", "num_tried", "row", "stage")

    def __init__(self, entry: Entry, *, layout: Layout, row: Row, stage: str) -> None:
        self.entry = weakref.ref(entry)
        self.content = weakref.ref(entry.content) if isinstance(entry.content, Encoded) else None
        self.line = entry.line
        self.layout = layout
        self.row = row
        self.stage = stage
        self.num_tried = 0
        self.is_shared = False

    def living(self) -> Content | None:
        """Return the content, if anything holds it."""
        entry = self.entry()
        if entry is not None and isinstance(entry.content, Encoded):
            self.content = weakref.ref(entry.content)
        if self.content is not None:
            return self.content()
        return entry.content if entry is not None else None


class Sharer:
    """Gives up this rank's bytes for shared ones wherever other ranks announced the same."""

    def __init__(self, sharding: Sharding, *, ledger: Ledger) -> None:
        self._sharding = sharding
        self._ledger = ledger
        self._settled: list[_Settled] = []
        self._step = 0
        self._stretch = 0
        self._is_new_step = True
        self.is_open = False
        """Whether something was packed since the outermost enter and the last unpack."""

    @property
    def traffic(self) -> Traffic:
        """What came from other ranks since the outermost enter."""
        return self._sharding.traffic

    def group_held_bytes(self, held_bytes: int) -> int:
        """Return what all ranks are known to hold, this one `held_bytes`."""
        return self._sharding.group_held_bytes(held_bytes)

    def begin_step(self) -> None:
        """Join the other ranks; entries of an earlier step are tried once more, and then not again."""
        self._close(patiently=False)
        self._sharding.begin_step(self._ledger)
        self._settled.clear()
        self._is_new_step = True
        self.is_open = False

    def begin_pack(self) -> None:
        """Count steps and stretches by what every rank does alike: enter, pack and unpack."""
        if self.is_open:
            return
        self.is_open = True
        if self._is_new_step:
            self._is_new_step = False
            self._step += 1
            self._stretch = 0
        self._stretch += 1
        self._sharding.begin_stretch(step=self._step, stretch=self._stretch)

    def begin_backward(self) -> None:
        """Share what is agreed, before something is unpacked."""
        self.is_open = False
        self._close(patiently=True)

    def _close(self, *, patiently: bool) -> None:
        if self._sharding.close(patiently=patiently):
            self._try_all(is_final=True)
            self._sharding.begin_serving()

    def add(self, entry: Entry, *, layout: Layout, row: Row, stage: str) -> None:
        """Take an entry that has settled as `stage`, and tell the other ranks."""
        if stage == "content" or entry.follows or not self._sharding.is_joined:
            return
        digests = []
        if isinstance(entry.content, Encoded):
            # What lies on other ranks already is theirs to gather under the number that it had.
            digests = [
                part.digest for part in entry.content.parts if _is_worth_sharing(part) and part.is_near
            ]
        elif isinstance(entry.content, Reference) and entry.digest and _is_near(entry.content.source):
            digests = [entry.digest]
        for digest in digests:
            self._sharding.announce(digest)
        if digests:
            self._settled.append(_Settled(entry, layout=layout, row=row, stage=stage))

    def share(self, *, is_final: bool) -> None:
        """Try all entries whose bytes are this rank's own, and count who holds the others.

        Args:
            is_final: no saves are about to follow for which what is here would serve as a key.
        """
        if self._settled:
            self._sharding.look()
            self._try_all(is_final=is_final)

    def _try_all(self, *, is_final: bool) -> None:
        self._settled = [each for each in self._settled if self._is_living(each, is_final=is_final)]

    def _is_living(self, local: _Settled, *, is_final: bool) -> bool:
        content = local.living()
        if local.num_tried < _NUM_TRIED:
            if isinstance(content, Reference):
                self._share_reference(content, local)
            elif isinstance(content, Encoded):
                self._share(content, local, is_final=is_final)
        return content is not None

    def _share_reference(self, reference: Reference, local: _Settled) -> None:
        entry, source = local.entry(), reference.source
        if entry is None or entry.digest is None or not self._is_due(entry.digest, local.line):
            return
        if reference.is_stale or digest_of(source) != entry.digest:
            local.num_tried = _NUM_TRIED
            return
        watch = reference.watch(entry.digest)
        block, start = block_of(source, local.layout, whole_storage=True)
        content = Encoded(RawPayload(block.flat, digest=entry.digest), start=start, charge=None)
        self._share(content, local, is_final=True)
        if local.is_shared:
            entry.own(content, watch=watch)

    def _share(self, content: Encoded, local: _Settled, *, is_final: bool) -> None:
        due = [
            part
            for part in content.parts
            if _is_worth_sharing(part)
            # A list that lies elsewhere could not serve as the key of a save to come.
            and (is_final or self._sharding.is_near or not part.is_key)
            and self._is_due(part.digest, local.line)
        ]
        changed = [self._share_part(part) for part in due]
        if any(changed):
            content.recharge(self._ledger)
            local.line.is_shared = any(self._sharding.num_holders(part.digest) > 1 for part in due)
            local.line.reading.learn(won=True)
        if any(part.is_shared for part in due) and not local.is_shared:
            local.is_shared = True
            local.row.recount("shared", was=local.stage)
        if self._sharding.is_near and not all(part.is_shared for part in due):
            local.num_tried += 1  # a part that another rank is just publishing is there at a later try

    def _share_part(self, part: Part) -> bool:
        return part.share(self._sharding.place, num_holders=self._sharding.num_holders(part.digest))

    def _is_due(self, digest: bytes, line: Line) -> bool:
        """Whether other ranks hold these bytes; where the last save of this instruction was shared, and no
        rank needs another to read, also those that are published for who comes later.
        """
        return self._sharding.num_holders(digest) > 1 or (self._sharding.is_near and line.is_shared)


def _is_worth_sharing(part: Part) -> bool:
    return part.num_all_bytes >= MIN_BYTES and part.device.type == "cpu"


def _is_near(source: Tensor) -> bool:
    return source.device.type == "cpu" and source.untyped_storage().nbytes() >= MIN_BYTES
