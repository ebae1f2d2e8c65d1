"""Give each element of a 16-bit weight what a table says of its bit pattern.

A large weight on a CPU is read in one pass by a compiled function; where there is no compiler, and for all
others, piece by piece in torch operations, to the same bits (but for those of NaN).
"""

from __future__ import annotations

import torch

from edkm.chunks import chunks
from edkm.compiled import Compiled, is_large, require_compiled
from edkm.patterns import NUM_PATTERNS, pattern_keys


def look_up(weight: torch.Tensor, table: torch.Tensor, *, dtype: torch.dtype, into: torch.Tensor) -> None:
    """Write the entry of each weight.

    Arguments:
        weight: `[N]`, read in `dtype`.
        table: `[65536]`, by the keys of `edkm.patterns`.
        dtype: float16 or bfloat16.
        into: `[N]`, in the table's dtype.
    """
    if is_large(weight, dtype) and _ENTRIES.run(weight.view(torch.int16), table, into):
        return
    for keys, part in zip(pattern_keys(weight, dtype), chunks(into), strict=True):
        torch.index_select(table, 0, keys, out=part)


def look_up_line(
    weight: torch.Tensor,
    at: torch.Tensor,
    *,
    slope: torch.Tensor,
    height: torch.Tensor,
    dtype: torch.dtype,
    into: torch.Tensor,
) -> None:
    """Write `slope * at + height` of each weight's entries.

    Arguments:
        weight: `[N]`, read in `dtype`.
        at: `[N]`, floating point.
        slope: `[65536]`, float32 or float64, by the keys of `edkm.patterns`.
        height: as `slope`.
        dtype: float16 or bfloat16.
        into: `[N]`, floating point.
    """
    if is_large(weight, dtype) and _LINES.run(weight.view(torch.int16), at, slope, height, into):
        return
    # As one complex number a pattern, the pair takes one look-up. Buffers, as for the keys.
    lines, parts = torch.complex(height, slope), chunks(at)
    found = torch.empty(parts[0].shape, dtype=lines.dtype, device=at.device)
    line = torch.empty(parts[0].shape, dtype=slope.dtype, device=at.device)
    for keys, given, part in zip(pattern_keys(weight, dtype), parts, chunks(into), strict=True):
        pair = torch.view_as_real(torch.index_select(lines, 0, keys, out=found[: keys.numel()]))
        part.copy_(line[: keys.numel()].copy_(given).mul_(pair[:, 1]).add_(pair[:, 0]))


def _entries(bits: torch.Tensor, table: torch.Tensor, into: torch.Tensor) -> None:
    require_compiled()
    into.copy_(table[bits.to(torch.int32) & (NUM_PATTERNS - 1)])


def _lines(
    bits: torch.Tensor, at: torch.Tensor, slope: torch.Tensor, height: torch.Tensor, into: torch.Tensor
) -> None:
    require_compiled()
    keys = bits.to(torch.int32) & (NUM_PATTERNS - 1)
    into.copy_(at.to(slope.dtype) * slope[keys] + height[keys])


_ENTRIES, _LINES = Compiled(_entries), Compiled(_lines)
