"""The storage of a save as the store's own payload."""

from torch import Tensor

from offload.codecs.raw import RawPayload
from offload.handle import Encoded, Reference
from offload.layout import flat_of, lift


def take_over(reference: Reference, *, digest: bytes | None) -> Encoded:
    """Return the storage of a reference as a payload, which nobody else has; `digest` is that of its bytes,
    where it is known.
    """
    source = reference.source
    taken = Encoded(RawPayload(flat_of(source), digest=digest), start=0, charge=reference.charge)
    taken.lent = (lift(source)[0], source) if type(source) is Tensor else None
    return taken
