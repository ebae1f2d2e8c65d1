"""Try the codecs on a block, the most promising first."""

from collections.abc import Sequence

from offload.codecs.base import Block, Codec, Payload
from offload.codecs.index_list import IndexLists


def encode_best(
    block: Block,
    codecs: Sequence[Codec],
    *,
    lists: IndexLists,
    last: str | None = None,
    at_once: bool = False,
) -> tuple[str, Payload] | None:
    """Return the name of the codec that won and its payload, or None when none makes the block about half as
    large (Law 7).

    Codecs stand in the order of their cost in time. Each gives an estimate from a sample, and a later one
    must promise half of what the ones before it do: bytes that few are not worth a dearer way. The best
    promise encodes; where it was wrong, the others are asked anew. The codec named `last` won the save before
    on the same line: where none ahead of it promises anything it encodes without an estimate, and with
    `at_once` before any other is asked.
    """
    if at_once:
        for codec in codecs:
            if codec.name == last:
                payload = codec.encode(block, limit_bytes=block.limit_bytes, lists=lists)
                if payload is not None:
                    return codec.name, payload
    best, limit_bytes = None, block.limit_bytes
    for codec in codecs:
        if codec.name == last and best is None:
            payload = codec.encode(block, limit_bytes=limit_bytes, lists=lists)
            if payload is not None:
                return codec.name, payload
            continue
        estimate = codec.estimate_bytes(block, limit_bytes=limit_bytes, lists=lists)
        if estimate is not None:
            best, limit_bytes = codec, estimate // 2
    if best is None:
        return None
    payload = best.encode(block, limit_bytes=block.limit_bytes, lists=lists)
    if payload is not None:
        return best.name, payload
    return encode_best(block, [codec for codec in codecs if codec is not best], lists=lists)
