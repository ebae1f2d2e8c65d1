"""Bytes of the store's own as they lay: a copy, or the storage itself once nobody else has it."""

from torch import Tensor

from offload.codecs.raw import RawPayload
from offload.handle import Encoded, Reference
from offload.layout import Layout, block_of, flat_of, lift
from offload.ledger import Ledger


def take_over(reference: Reference, *, digest: bytes | None) -> Encoded:
    """Return the storage of a reference as a payload, which nobody else has; `digest` is that of its bytes,
    where it is known.
    """
    source = reference.source
    taken = Encoded(RawPayload(flat_of(source), digest=digest), start=0, charge=reference.charge)
    taken.lent = (lift(source)[0], source) if type(source) is Tensor else None
    return taken


def copy_of(source: Tensor, layout: Layout, *, whole_storage: bool, ledger: Ledger) -> Encoded:
    """Return a copy of the storage of `source`, or of what `layout` reaches of it."""
    block, start = block_of(source, layout, whole_storage=whole_storage)
    return Encoded(RawPayload(block.flat.clone()), start=start, charge=ledger.charge(block.num_bytes))
