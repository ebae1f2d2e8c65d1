"""Try the codecs on a block, the most promising first."""

from collections.abc import Sequence

from offload.codecs.base import Block, Codec, Payload
from offload.codecs.index_list import IndexLists


def encode_best(block: Block, codecs: Sequence[Codec], *, lists: IndexLists) -> tuple[str, Payload] | None:
    """Return the name of the codec that won and its payload, or None when no codec at least halves the block (Law 7).

    Less than half is not worth the time of encoding and decoding. Codecs are asked for an estimate from a sample; those that give one
    encode in its order until one succeeds.
    """
    limit_bytes = block.num_bytes // 2
    estimates = [
        (size, number)
        for number, codec in enumerate(codecs)
        if (size := codec.estimate_bytes(block, limit_bytes=limit_bytes, lists=lists)) is not None and size <= limit_bytes
    ]
    for _, number in sorted(estimates):
        payload = codecs[number].encode(block, limit_bytes=limit_bytes, lists=lists)
        if payload is not None:
            return codecs[number].name, payload
    return None
