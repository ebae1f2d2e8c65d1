"""From a settled entry to bytes that several ranks hold once: tried when entries settle, and at each later
look.
"""

import weakref
from functools import partial

from offload.codecs.raw import RawPayload
from offload.dedupe import StorageRecord
from offload.digest import digest_of
from offload.handle import Encoded, Entry, Reference
from offload.layout import Layout, block_of
from offload.sharding.base import Sharding
from offload.stats import Ledger, Row

_NUM_TRIED = 4


class _Settled:
    """A settled entry, shared among `num_holders` ranks, 0 while its bytes are this rank's own. Weak: the
    graph's end takes the entry along.
    """

    __slots__ = ("entry", "is_done", "layout", "num_holders", "num_tried", "record", "row", "stage")

    def __init__(self, entry: Entry, *, layout: Layout, record: StorageRecord, row: Row, stage: str) -> None:
        self.entry = weakref.ref(entry)
        self.layout = layout
        self.record = record
        self.row = row
        self.stage = stage
        self.num_holders = 0
        self.num_tried = 0
        self.is_done = False


class Sharer:
    """Gives up this rank's bytes for shared ones wherever another rank announced the same."""

    def __init__(self, sharding: Sharding, *, ledger: Ledger) -> None:
        self._sharding = sharding
        self._ledger = ledger
        self._settled: list[_Settled] = []

    def begin_step(self) -> None:
        """Join the other ranks; entries of an earlier step that live on are tried no more."""
        self._sharding.look()
        self._settled.clear()

    def announce(self, digest: bytes) -> None:
        """Tell the other ranks what this one saved."""
        self._sharding.announce(digest)

    def add(self, entry: Entry, *, layout: Layout, record: StorageRecord, row: Row, stage: str) -> None:
        """Take an entry that has settled as `stage`."""
        content = entry.content
        # On another device a reference stays where it is.
        is_near = not isinstance(content, Reference) or content.source.device.type == "cpu"
        if stage != "content" and is_near and not entry.follows and self._sharding.is_joined:
            self._settled.append(_Settled(entry, layout=layout, record=record, row=row, stage=stage))

    def share(self) -> None:
        """Try all entries whose bytes are this rank's own, and count who holds the others."""
        if self._settled:
            self._sharding.look()
            self._settled = [each for each in self._settled if self._is_worth_another_try(each)]

    def _is_worth_another_try(self, local: _Settled) -> bool:
        entry = local.entry()
        if entry is None or entry.digest is None:
            return False
        num_holders = self._sharding.num_holders(entry.digest)
        if local.num_holders:
            self._count_holders(entry, local, num_holders)
        # Where the last save of this instruction was shared, this one is published for those who come later.
        if not local.is_done and (num_holders > 1 or entry.line.is_shared):
            self._share(entry, local, num_holders)
        return local.num_holders > 0 or not local.is_done

    def _count_holders(self, entry: Entry, local: _Settled, num_holders: int) -> None:
        """Charge this rank's part anew when more ranks have come to hold the same."""
        if num_holders > local.num_holders and isinstance(entry.content, Encoded):
            local.num_holders = num_holders
            entry.line.is_shared = True
            entry.content.count_holders(num_holders, ledger=self._ledger)

    def _share(self, entry: Entry, local: _Settled, num_holders: int) -> None:
        """Try once; a part that another rank is just publishing is there at a later try."""
        local.num_tried += 1
        if isinstance(entry.content, Reference):
            num_shared, num_left = self._share_reference(entry, entry.content, local, num_holders)
        elif isinstance(entry.content, Encoded):
            place = partial(self._sharding.place, num_holders=num_holders)
            num_shared, num_left = entry.content.share(place, ledger=self._ledger)
        else:
            num_shared, num_left = 0, 0
        local.is_done = num_left == 0 or local.num_tried >= _NUM_TRIED
        if num_shared and not local.num_holders:
            local.num_holders = num_holders
            entry.line.is_shared = num_holders > 1
            entry.line.reading.learn(won=True)
            local.row.recount("shared", was=local.stage)

    def _share_reference(
        self, entry: Entry, reference: Reference, local: _Settled, num_holders: int
    ) -> tuple[int, int]:
        source = reference.source
        if reference.is_stale or digest_of(source) != entry.digest:
            return 0, 0
        block, start = block_of(source, local.layout, whole_storage=True)
        placed = self._sharding.place(block.flat, num_holders=num_holders)
        if placed is None or placed[1].digest != entry.digest:  # another thread wrote while it was copied
            return 0, 1
        payload = RawPayload(placed[0], lease=placed[1])
        entry.content = Encoded(payload, start=start, charge=self._ledger.charge(payload.num_bytes))
        local.record.copied_version = source._version
        return 1, 0
