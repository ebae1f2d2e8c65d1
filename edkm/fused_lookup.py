"""Give each element of a 16-bit weight what a table says of its bit pattern.

A large weight on a CPU is read in one pass by a compiled function; where there is no compiler, and for all
others, piece by piece in torch operations, to the same bits.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from edkm.chunks import chunks
from edkm.patterns import NUM_PATTERNS, pattern_keys

# Compiling takes seconds, once a process: so many weights are looked up in a few milliseconds.
_LEAST_COMPILED = 1 << 22

_Kernel = Callable[..., None]

_log = logging.getLogger(__name__)


def look_up(weight: torch.Tensor, table: torch.Tensor, *, dtype: torch.dtype, into: torch.Tensor) -> None:
    """Write the entry of each weight.

    Arguments:
        weight: `[N]`, read in `dtype`.
        table: `[65536]`, by the keys of `edkm.patterns`.
        dtype: float16 or bfloat16.
        into: `[N]`, in the table's dtype.
    """
    compiled = _compiled(weight, dtype, kernel=_entries)
    if compiled is not None:
        compiled(weight.view(torch.int16), table, into)
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
    compiled = _compiled(weight, dtype, kernel=_lines)
    if compiled is not None:
        compiled(weight.view(torch.int16), at, slope, height, into)
        return
    # As one complex number a pattern, the pair takes one look-up. Buffers, as for the keys.
    lines, parts = torch.complex(height, slope), chunks(at)
    found = torch.empty(parts[0].shape, dtype=lines.dtype, device=at.device)
    line = torch.empty(parts[0].shape, dtype=slope.dtype, device=at.device)
    for keys, given, part in zip(pattern_keys(weight, dtype), parts, chunks(into), strict=True):
        pair = torch.view_as_real(torch.index_select(lines, 0, keys, out=found[: keys.numel()]))
        part.copy_(line[: keys.numel()].copy_(given).mul_(pair[:, 1]).add_(pair[:, 0]))


def _entries(bits: torch.Tensor, table: torch.Tensor, into: torch.Tensor) -> None:
    into.copy_(table[bits.to(torch.int32) & (NUM_PATTERNS - 1)])


def _lines(
    bits: torch.Tensor, at: torch.Tensor, slope: torch.Tensor, height: torch.Tensor, into: torch.Tensor
) -> None:
    keys = bits.to(torch.int32) & (NUM_PATTERNS - 1)
    into.copy_(at.to(slope.dtype) * slope[keys] + height[keys])


def _compiled(weight: torch.Tensor, dtype: torch.dtype, *, kernel: _Kernel) -> _Kernel | None:
    """Return `kernel` as a compiled function, if it is worth compiling for this weight and can be."""
    if weight.dtype != dtype or weight.numel() < _LEAST_COMPILED or weight.device.type != "cpu":
        return None
    # Under a mode or a tracer, what is called is to be seen.
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return None
    return _compile(kernel, dtype)


@functools.cache
def _compile(kernel: _Kernel, dtype: torch.dtype) -> _Kernel | None:
    """Return `kernel` compiled, or None where it cannot be: most often there is no compiler."""
    # As many as are worth it: for a few it would be compiled to run on one thread.
    given, wide = torch.zeros(_LEAST_COMPILED, dtype=dtype), torch.zeros(NUM_PATTERNS)
    bits = given.view(torch.int16)
    example = [bits, wide.to(dtype)] if kernel is _entries else [bits, given, wide, wide.clone()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about its own
            # In this process: a pool of others would outlive what they compile.
            function = torch.compile(kernel, dynamic=True, options={"compile_threads": 1})
            call = functools.partial(_call, function)
            call(*example, given.clone())
    except Exception as error:
        _log.info("look-ups of large weights are not compiled: %s", error)
        return None
    return call


def _call(function: _Kernel, *arguments: torch.Tensor) -> None:
    # Of what a function is compiled anew for, these two may differ from call to call.
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        function(*(each.detach() for each in arguments))
