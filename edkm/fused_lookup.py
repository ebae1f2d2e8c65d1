"""Give each element of a 16-bit weight what a table says of its bit pattern.

A large weight on a CPU is read in one pass by a compiled function; where there is no compiler, and for all
others, piece by piece in torch operations, to the same bits (but for those of NaN).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from edkm.chunks import chunks
from edkm.patterns import NUM_PATTERNS, pattern_keys

# Compiling takes seconds, once a process: so many weights are looked up in a few milliseconds.
_LEAST_COMPILED = 1 << 22

_log = logging.getLogger(__name__)


def look_up(weight: torch.Tensor, table: torch.Tensor, *, dtype: torch.dtype, into: torch.Tensor) -> None:
    """Write the entry of each weight.

    Arguments:
        weight: `[N]`, read in `dtype`.
        table: `[65536]`, by the keys of `edkm.patterns`.
        dtype: float16 or bfloat16.
        into: `[N]`, in the table's dtype.
    """
    if _is_large(weight, dtype) and _ENTRIES.run(weight.view(torch.int16), table, into):
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
    if _is_large(weight, dtype) and _LINES.run(weight.view(torch.int16), at, slope, height, into):
        return
    # As one complex number a pattern, the pair takes one look-up. Buffers, as for the keys.
    lines, parts = torch.complex(height, slope), chunks(at)
    found = torch.empty(parts[0].shape, dtype=lines.dtype, device=at.device)
    line = torch.empty(parts[0].shape, dtype=slope.dtype, device=at.device)
    for keys, given, part in zip(pattern_keys(weight, dtype), parts, chunks(into), strict=True):
        pair = torch.view_as_real(torch.index_select(lines, 0, keys, out=found[: keys.numel()]))
        part.copy_(line[: keys.numel()].copy_(given).mul_(pair[:, 1]).add_(pair[:, 0]))


def _is_large(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether compiling is worth it for this weight."""
    if weight.dtype != dtype or weight.numel() < _LEAST_COMPILED or weight.device.type != "cpu":
        return False
    # Under a mode or a tracer, what is called is to be seen.
    return not torch.compiler.is_compiling() and _get_current_dispatch_mode() is None


class _Compiled:
    """A function of tensors that is compiled when it is first run, by weights that are worth it."""

    def __init__(self, kernel: Callable[..., None]) -> None:
        self._kernel = kernel
        self._function: Callable[..., None] | None = None
        self._works = True

    def run(self, *arguments: torch.Tensor) -> bool:
        """Run it, and return whether it ran; not once it failed, most often for want of a compiler."""
        if not self._works:
            return False
        try:
            # Of what a function is compiled anew for, these two may differ from call to call.
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                self._run(*(each.detach() for each in arguments))
        except Exception as error:
            _log.info("look-ups of large weights are not compiled: %s", error)
            self._works = False
        return self._works

    def _run(self, *arguments: torch.Tensor) -> None:
        if self._function is not None:
            self._function(*arguments)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about its own
            # In this process: a pool of others would outlive what they compile.
            self._function = torch.compile(self._kernel, dynamic=True, options={"compile_threads": 1})
            self._function(*arguments)


def _entries(bits: torch.Tensor, table: torch.Tensor, into: torch.Tensor) -> None:
    _require_compiled()
    into.copy_(table[bits.to(torch.int32) & (NUM_PATTERNS - 1)])


def _lines(
    bits: torch.Tensor, at: torch.Tensor, slope: torch.Tensor, height: torch.Tensor, into: torch.Tensor
) -> None:
    _require_compiled()
    keys = bits.to(torch.int32) & (NUM_PATTERNS - 1)
    into.copy_(at.to(slope.dtype) * slope[keys] + height[keys])


def _require_compiled() -> None:
    # Run as it stands, all at once, it would take several times the memory of the weight.
    if not torch.compiler.is_compiling():
        raise RuntimeError("torch.compile is turned off")


_ENTRIES, _LINES = _Compiled(_entries), _Compiled(_lines)
