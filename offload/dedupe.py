"""One copy per storage and per content: living storage + version, confirmed by a 128-bit hash of the bytes
(Law 5).
"""

import weakref

import torch
from torch import Tensor

from offload.handle import Entry

_LEAST_SWEPT = 1024
"""Records of dead storages are dropped when a step begins, and when there are more than so many."""


class StorageRecord(weakref.ref[torch.UntypedStorage]):
    """A weak reference to a storage, one to the entry that it has, and when that was saved: handles own
    entries.

    A version only grows, so the newest entry is the only one that can be saved again.
    """

    __slots__ = ("entry", "step", "version")
    entry: weakref.ref[Entry]
    step: int
    version: int

    def at(self, version: int) -> Entry | None:
        """Return the living entry of `version`, if any."""
        return self.entry() if self.version == version else None


class StorageIndex:
    """Entries by living storage: an address may come back after a free, a dead weak reference does not."""

    def __init__(self) -> None:
        self.records: dict[int, StorageRecord] = {}
        self._most_records = _LEAST_SWEPT
        self._step = 0

    def begin_step(self) -> None:
        """Forget which storages were saved in this step."""
        self._step += 1
        self._sweep()

    def _sweep(self) -> None:
        # All at once: a callback at each storage's end would run Python between the operators of backward.
        for key in [key for key, record in self.records.items() if record() is None]:
            del self.records[key]
        self._most_records = max(_LEAST_SWEPT, 2 * len(self.records))

    def find(self, storage: torch.UntypedStorage) -> StorageRecord | None:
        """Return what is known of a storage."""
        record = self.records.get(id(storage))
        return record if record is not None and record() is storage else None

    def is_counted(self, record: StorageRecord | None) -> bool:
        """Return whether it is a storage that was put in this step."""
        return record is not None and record.step == self._step

    def put(self, entry: Entry, storage: torch.UntypedStorage, *, version: int) -> None:
        """Make `entry` the one that is found."""
        if len(self.records) >= self._most_records:
            self._sweep()
        record = self.records[id(storage)] = StorageRecord(storage)
        record.entry, record.version, record.step = weakref.ref(entry), version, self._step


class ContentIndex:
    """Living entries by the hash of their bytes, the number of bytes and the device."""

    def __init__(self) -> None:
        self._entries: weakref.WeakValueDictionary[tuple[bytes, int, torch.device], Entry] = (
            weakref.WeakValueDictionary()
        )

    def find(self, digest: bytes, source: Tensor) -> Entry | None:
        """Return a living entry with these bytes on the same device, if any."""
        return self._entries.get(self._key(digest, source))

    def put(self, entry: Entry, source: Tensor) -> None:
        """Make `entry`, which holds the bytes of `source`, the one that is found for them."""
        if entry.digest is not None:
            self._entries[self._key(entry.digest, source)] = entry

    @staticmethod
    def _key(digest: bytes, source: Tensor) -> tuple[bytes, int, torch.device]:
        return digest, source.untyped_storage().nbytes(), source.device
