"""Late saves: not looked at before their operators have returned, and then hashed once.

Once nobody else has a storage, its bytes are what plain autograd would read at backward, whatever was written
before, so no hash of an earlier moment is needed (Law 4). Which lines save such storages is learnt.
"""

import weakref

from torch import Tensor

from offload.dedupe import StorageIndex
from offload.digest import digest_of
from offload.handle import Entry, Handle, Kept, Reference
from offload.layout import Layout, lift
from offload.ledger import Ledger
from offload.pending import Late, Pending, leave
from offload.select import is_readable


def enter(late: Late, *, storages: StorageIndex, ledger: Ledger) -> Pending | None:
    """Give a late save its entry, that of its storage if there is one; None where it needs no more."""
    kept = late.kept()
    alias = kept.alias if kept is not None else None
    if kept is None or alias is None or alias._version != kept.version:
        leave(late)
        return None
    layout, source = lift(alias)
    storage = source.untyped_storage()
    record = storages.find(storage)
    known = record.at(kept.version) if record is not None else None
    if known is not None and isinstance(known.content, Reference):
        if known.digest is None or known.digest == digest_of(source):
            late.row.count("storage")
            saver = known.content.add(source, version=kept.version)
            _hand_over(kept, late, Handle(known, layout=layout, saver=saver), ledger)
            return None
        known.follows = True
    if known is not None or storage.nbytes() < late.num_bytes or not is_readable(layout, late.num_bytes):
        leave(late)
        return None
    return _enter_anew(kept, late, layout, source, storages=storages, ledger=ledger)


def _enter_anew(
    kept: Kept, late: Late, layout: Layout, source: Tensor, *, storages: StorageIndex, ledger: Ledger
) -> Pending:
    storage = source.untyped_storage()
    charge = ledger.charge(late.num_bytes, key=id(storage))
    reference = Reference(source, version=kept.version, num_bytes=late.num_bytes, charge=charge)
    entry = Entry(reference, line=late.line)
    storages.put(entry, storage, version=kept.version)
    _hand_over(kept, late, Handle(entry, layout=layout), ledger)
    return Pending(late.sequence, weakref.ref(entry), layout, late.row, late.claim, late.num_bytes)


def _hand_over(kept: Kept, late: Late, handle: Handle, ledger: Ledger) -> None:
    ledger.end(late.claim)  # first: an interrupt in between leaves an end that comes twice, and not none
    kept.hold(handle)
