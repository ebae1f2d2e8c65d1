"""The bytes as they are: a copy of the store's own, for when a tensor may not be kept by reference."""

from torch import Tensor

from offload.codecs.base import Block, Codec, Payload
from offload.codecs.index_list import IndexLists
from offload.part import Part


class Raw(Codec):
    """A plain copy. Never wins, so it is only used where a copy is needed."""

    __slots__ = ()

    name = "raw"

    def estimate_bytes(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> int | None:
        """Return the block's own size, or None above the limit."""
        return block.num_bytes if block.num_bytes <= limit_bytes else None

    def encode(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> Payload | None:
        """Return a copy, or None above the limit."""
        return RawPayload(block.flat.clone()) if block.num_bytes <= limit_bytes else None


class RawPayload(Payload):
    """The bytes of a block; with `digest`, theirs."""

    __slots__ = ("_flat",)

    def __init__(self, flat: Tensor, *, digest: bytes | None = None) -> None:
        self._flat = Part(flat, digest=digest)

    @property
    def num_bytes(self) -> int:
        """Bytes of the copy."""
        return self._flat.num_bytes

    @property
    def parts(self) -> tuple[Part, ...]:
        """The copy."""
        return (self._flat,)

    def decode(self) -> Tensor:
        """Return a copy of the copy: what autograd gets may be written to."""
        return self._flat.read_own()

    @property
    def can_lend(self) -> bool:
        """Whether no other rank has it."""
        return not self._flat.is_shared

    def lend(self) -> Tensor:
        """Return the copy itself."""
        return self._flat.lend()
