"""16-bit floats by their bit patterns: a weight has at most 65,536 different values."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from edkm.chunks import CPU_CHUNK, chunks
from edkm.compiled import Compiled, is_large, require_compiled

NUM_PATTERNS = 1 << 16
# Each chunk that is counted takes a pass over the counts, too.
_COUNTED = 1 << 19


def pattern_keys(
    weight: torch.Tensor, dtype: torch.dtype, *, cpu_chunk: int = CPU_CHUNK
) -> Iterator[torch.Tensor]:
    """The bits of each weight in `dtype`, float16 or bfloat16, as a number without sign: int32, chunk by
    chunk of `[N]`. Each chunk of keys is overwritten by the next.
    """
    parts = chunks(weight, cpu_chunk=cpu_chunk)
    # One buffer: the heap would hand the pages of each chunk back, and fault them in again.
    buffer = torch.empty(parts[0].shape, dtype=torch.int32, device=weight.device)
    for part in parts:
        yield buffer[: part.numel()].copy_(part.to(dtype).view(torch.uint16))


def pattern_values(found: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What some keys stand for, the inverse of `pattern_keys`."""
    return found.to(torch.int16).view(dtype)


def pattern_counts(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How many of some weights, `[N]`, have each key in `dtype`: `[65536]` int64."""
    if _may_compile(weight, dtype) and weight.numel() <= torch.iinfo(torch.int32).max:
        counts = torch.zeros(NUM_PATTERNS, dtype=torch.int32, device=weight.device)
        if _COUNTS.run(weight.view(torch.int16), counts):
            return counts.long()
    total = torch.zeros(NUM_PATTERNS, dtype=torch.int64, device=weight.device)
    for keys in pattern_keys(weight, dtype, cpu_chunk=_COUNTED):
        total += torch.bincount(keys, minlength=NUM_PATTERNS)
    return total


def pattern_sums(weight: torch.Tensor, dtype: torch.dtype, *, terms: torch.Tensor) -> torch.Tensor:
    """The sum of the `terms`, `[N]`, of the weights, `[N]`, that have each key: `[65536]` float64."""
    if _may_compile(weight, dtype):
        sums = torch.zeros(NUM_PATTERNS, dtype=torch.float64, device=weight.device)
        if _SUMS.run(weight.view(torch.int16), terms, sums):
            return sums
    total = torch.zeros(NUM_PATTERNS, dtype=torch.float64, device=weight.device)
    parts = chunks(terms, cpu_chunk=_COUNTED)
    wide = torch.empty(parts[0].shape, dtype=torch.float64, device=weight.device)
    for keys, part in zip(pattern_keys(weight, dtype, cpu_chunk=_COUNTED), parts, strict=True):
        total += torch.bincount(keys, weights=wide[: part.numel()].copy_(part), minlength=NUM_PATTERNS)
    return total


def _may_compile(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    # Adding where a key says is not compiled then, but called, for all keys at once.
    return is_large(weight, dtype) and not torch.are_deterministic_algorithms_enabled()


def _counts(bits: torch.Tensor, into: torch.Tensor) -> None:
    require_compiled()
    keys = bits.to(torch.int32) & (NUM_PATTERNS - 1)
    into.index_put_((keys,), into.new_ones(()), accumulate=True)


def _sums(bits: torch.Tensor, terms: torch.Tensor, into: torch.Tensor) -> None:
    require_compiled()
    keys = bits.to(torch.int32) & (NUM_PATTERNS - 1)
    into.index_put_((keys,), terms.to(into.dtype), accumulate=True)


_COUNTS, _SUMS = Compiled(_counts, in_order=True), Compiled(_sums, in_order=True)
