"""Records of storages: one a living storage, dropped when it is gone."""

import torch

from offload.dedupe import StorageIndex
from offload.handle import Entry, Reference
from offload.patience import Line


def an_entry() -> Entry:
    return Entry(Reference(torch.zeros(1)), line=Line())


def test_the_views_of_a_storage_have_one_entry_a_version_and_another_storage_has_none() -> None:
    storages, x, entry = StorageIndex(), torch.randn(8, 8), an_entry()
    storages.put(entry, x.untyped_storage(), version=3)
    record = storages.find(x.t()[2:].untyped_storage())
    assert record is not None
    assert record.at(3) is entry
    assert record.at(4) is None
    assert storages.find(x.clone().untyped_storage()) is None
    del entry
    assert record.at(3) is None


def test_a_step_drops_the_records_of_dead_storages_and_a_long_one_drops_them_too() -> None:
    storages, kept, entry = StorageIndex(), torch.randn(4), an_entry()
    storages.put(entry, kept.untyped_storage(), version=0)
    record = storages.find(kept.untyped_storage())
    assert storages.is_counted(record)
    for _ in range(10_000):
        storages.put(entry, torch.randn(4).untyped_storage(), version=0)
        assert len(storages.records) <= 1024
    storages.begin_step()
    assert list(storages.records.values()) == [record]
    assert not storages.is_counted(record)
