"""Large results on huge pages, where Linux gives them to those who ask."""

from __future__ import annotations

import ctypes
import sys

import torch

_PAGE_BYTES = 1 << 21
_LEAST_BYTES = 4 * _PAGE_BYTES
_MADV_HUGEPAGE = 14


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """Return an uninitialised tensor of the shape and dtype of `tensor`, contiguous.

    To fault in the small pages of 32 MiB takes as long as to look up what is written there. (With
    THP_MEM_ALLOC_ENABLE=1 torch asks for huge ones for all that it allocates.)
    """
    made = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    if (
        _madvise is None
        or made.device.type != "cpu"
        or made.nbytes < _LEAST_BYTES
        or type(made) is not torch.Tensor
    ):
        return made
    start = -(-made.data_ptr() // _PAGE_BYTES) * _PAGE_BYTES
    stop = (made.data_ptr() + made.nbytes) // _PAGE_BYTES * _PAGE_BYTES
    _madvise(start, stop - start, _MADV_HUGEPAGE)  # where it is refused, small pages do
    return made


def _find_madvise() -> ctypes._NamedFuncPointer | None:
    if sys.platform != "linux":
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise


_madvise = _find_madvise()
