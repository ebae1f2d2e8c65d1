"""16-bit floats by their bit patterns: a weight has at most 65,536 different values."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from edkm.chunks import chunks

NUM_PATTERNS = 1 << 16
_HALF = NUM_PATTERNS // 2


def pattern_keys(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The bits of each weight in `dtype`, float16 or bfloat16, as an index from 0: int32, chunk by chunk of
    `[N]`. Each chunk of keys is overwritten by the next.
    """
    parts = chunks(weight)
    # One buffer: the heap would hand the pages of each chunk back, and fault them in again.
    buffer = torch.empty(parts[0].shape, dtype=torch.int32, device=weight.device)
    for part in parts:
        yield buffer[: part.numel()].copy_(part.to(dtype).view(torch.int16)).add_(_HALF)


def pattern_values(found: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What some keys stand for, the inverse of `pattern_keys`."""
    return (found - _HALF).to(torch.int16).view(dtype)


def pattern_counts(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How many of some weights, `[N]`, have each key in `dtype`: `[65536]` int64."""
    total = torch.zeros(NUM_PATTERNS, dtype=torch.int64, device=weight.device)
    for keys in pattern_keys(weight, dtype):
        total += torch.bincount(keys, minlength=NUM_PATTERNS)
    return total
