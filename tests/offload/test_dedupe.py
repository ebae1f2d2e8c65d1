"""Records of storages: one a living storage, dropped when it is gone."""

import torch

from offload.dedupe import StorageIndex
from offload.stats import Ledger


def test_one_record_for_the_views_of_a_storage_and_another_for_a_new_storage() -> None:
    storages = StorageIndex(Ledger())
    x = torch.randn(8, 8)
    record = storages.record(x.untyped_storage())
    assert storages.record(x.t()[2:].untyped_storage()) is record
    assert storages.record(x.clone().untyped_storage()) is not record
    assert record.num_bytes == x.nbytes


def test_a_step_drops_the_records_of_dead_storages_and_a_long_one_drops_them_too() -> None:
    storages, kept = StorageIndex(Ledger()), torch.randn(4)
    record = storages.record(kept.untyped_storage())
    for _ in range(10_000):
        storages.record(torch.randn(4).untyped_storage())
        assert len(storages._records) <= 1024
    storages.begin_step()
    assert list(storages._records.values()) == [record]
