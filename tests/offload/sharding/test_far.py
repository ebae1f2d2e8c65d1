"""What lies on other ranks is neither told again nor a key for what comes."""

import torch
from torch import Tensor

from offload.codecs.index_list import IndexLists
from offload.codecs.raw import RawPayload
from offload.digest import digest_of
from offload.handle import Encoded, Entry
from offload.layout import lift
from offload.ledger import Ledger
from offload.part import Lease
from offload.patience import Line
from offload.sharding.local import Local
from offload.share import Sharer
from offload.stats import Row


class FarLease(Lease):
    """All bytes, said to lie elsewhere."""

    def __init__(self, flat: Tensor) -> None:
        self._flat = flat.clone()

    num_bytes = 0
    is_near = False

    def count_holders(self, num_holders: int) -> bool:
        return False

    def read(self) -> Tensor:
        return self._flat

    def read_own(self) -> Tensor:
        return self._flat.clone()


class Far(Local):
    """Says that another rank holds whatever this one does, and notes what it is told."""

    is_joined = True
    is_near = False

    def __init__(self) -> None:
        self.announced: list[bytes] = []

    def announce(self, digest: bytes) -> None:
        self.announced.append(digest)

    def num_holders(self, digest: bytes) -> int:
        return 2

    def place(self, flat: Tensor, digest: bytes) -> Lease:
        return FarLease(flat)


def test_a_list_that_lies_elsewhere_is_not_found_again() -> None:
    lists = IndexLists(Ledger())
    index, first = torch.arange(7000, dtype=torch.int32) % 3, torch.arange(3, dtype=torch.int32)
    kept = lists.keep(index, first=first)
    assert lists.keep(index, first=first) is kept
    for part in kept.parts:
        part.share(lambda flat, digest: FarLease(flat), num_holders=2)
    another = lists.keep(index, first=first)
    assert another is not kept
    assert another.is_near
    assert torch.equal(another.numbers(), kept.numbers())


def test_what_was_leased_is_not_announced_again() -> None:
    sharding = Far()
    sharer = Sharer(sharding, ledger=Ledger())
    flat = torch.randint(256, (5000,), dtype=torch.uint8)
    layout, source = lift(flat)
    entry = Entry(Encoded(RawPayload(flat), start=None, charge=None), line=Line(), digest=digest_of(source))
    row = Row("", shape=(), dtype=flat.dtype)
    row.count("raw")
    for _ in range(2):
        sharer.add(entry, layout=layout, row=row, stage="raw")
        sharer.share(is_final=True)
    assert sharding.announced == [digest_of(source)]
