"""One copy per storage and per content: living storage + version, confirmed by a 128-bit hash of the bytes
(Law 5).
"""

import weakref

import torch
from torch import Tensor

from offload.handle import Entry
from offload.stats import Charge, Ledger

_LEAST_SWEPT = 1024
"""Records of dead storages are dropped when a step begins, and when there are more than so many."""


class StorageRecord(weakref.ref[torch.UntypedStorage]):
    """What the store knows of one storage, and a weak reference to it. All else it refers to weakly too:
    handles own entries, entries own charges.

    A version only grows, so the newest alone can be saved again.
    """

    __slots__ = ("_entry", "_entry_version", "charge", "counted_step", "num_bytes")

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.num_bytes = storage.nbytes()
        self.charge: weakref.ref[Charge] | None = None
        self.counted_step = -1
        self._entry: weakref.ref[Entry] | None = None
        self._entry_version = -1

    def entry(self, version: int) -> Entry | None:
        """Return the living entry of `version`, if any."""
        return self._entry() if self._entry is not None and self._entry_version == version else None

    def put(self, entry: Entry, version: int) -> None:
        """Make `entry` the one that is found for `version`."""
        self._entry = weakref.ref(entry)
        self._entry_version = version


class StorageIndex:
    """Living storages by identity: an address may come back after a free, a dead weak reference does not."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._records: dict[int, StorageRecord] = {}
        self._most_records = _LEAST_SWEPT
        self._step = 0
        self.counted_bytes = 0
        """Of the storages that were saved since the step began, each once."""

    def begin_step(self) -> None:
        """Count every storage anew."""
        self._step += 1
        self.counted_bytes = 0
        self._sweep()

    def _sweep(self) -> None:
        # All at once: a callback at each storage's end would run Python between the operators of backward.
        self._records = {key: record for key, record in self._records.items() if record() is not None}
        self._most_records = max(_LEAST_SWEPT, 2 * len(self._records))

    def record(self, storage: torch.UntypedStorage) -> StorageRecord:
        """Return the record of a storage of which something is being saved, a new one when it was not seen
        alive before, and count it.
        """
        record = self._records.get(id(storage))
        if record is None or record() is not storage:
            if len(self._records) >= self._most_records:
                self._sweep()
            record = self._records[id(storage)] = StorageRecord(storage)
        else:
            record.num_bytes = storage.nbytes()
        if record.counted_step != self._step:
            record.counted_step = self._step
            self.counted_bytes += record.num_bytes
        return record

    def charge(self, record: StorageRecord) -> tuple[Charge, int]:
        """Return the one charge for keeping this storage by reference, whatever number of entries do, and the
        bytes that it adds to what was charged.
        """
        charge = record.charge() if record.charge is not None else None
        if charge is not None:
            return charge, 0
        charge = self._ledger.charge(record.num_bytes)
        record.charge = weakref.ref(charge)
        return charge, record.num_bytes


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
