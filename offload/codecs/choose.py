"""Try the codecs on a block, the most promising first."""

from collections.abc import Sequence

from offload.codecs.base import Block, Codec, Payload
from offload.codecs.index_list import IndexLists


def encode_best(block: Block, codecs: Sequence[Codec], *, lists: IndexLists) -> tuple[str, Payload] | None:
    """Return the name of the codec that won and its payload, or None when none makes the block about half as
    large (Law 7).

    Codecs stand in the order of their cost in time. Each gives an estimate from a sample, and a later one
    must promise half of what the ones before it do: bytes that few are not worth a dearer way. The best
    promise encodes first, then the ones before it.
    """
    limit_bytes = block.limit_bytes
    promising: list[Codec] = []
    best = limit_bytes
    for codec in codecs:
        estimate = codec.estimate_bytes(block, limit_bytes=limit_bytes, lists=lists)
        if estimate is not None and estimate <= best:
            best = estimate // 2
            promising.append(codec)
    for codec in reversed(promising):
        payload = codec.encode(block, limit_bytes=limit_bytes, lists=lists)
        if payload is not None:
            return codec.name, payload
    return None
