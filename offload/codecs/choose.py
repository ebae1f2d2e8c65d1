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
    limit_bytes = best = block.limit_bytes
    worthy: list[tuple[int, int]] = []
    others: list[tuple[int, int]] = []
    for number, codec in enumerate(codecs):
        estimate = codec.estimate_bytes(block, limit_bytes=limit_bytes, lists=lists)
        if estimate is None:
            continue
        (worthy if estimate <= best else others).append((estimate, number))
        best = min(best, estimate // 2)
    for _, number in worthy[::-1] + sorted(others):
        payload = codecs[number].encode(block, limit_bytes=limit_bytes, lists=lists)
        if payload is not None:
            return codecs[number].name, payload
    return None
