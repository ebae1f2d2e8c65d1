"""Whether two tensors have the same bytes: `torch.equal` compares integers one by one, several times slower
than memory can be read.
"""

import ctypes

import torch
from torch import Tensor


def same_bytes(first: Tensor, second: Tensor) -> bool:
    """Return whether two contiguous tensors of integers of one size have the same bytes."""
    if first.nbytes != second.nbytes:
        return False
    if _memcmp is None or first.device.type != "cpu" or second.device.type != "cpu":
        return torch.equal(first.view(-1), second.view(-1))
    return bool(_memcmp(first.data_ptr(), second.data_ptr(), first.nbytes) == 0)


def _find_memcmp() -> "ctypes._NamedFuncPointer | None":
    try:
        memcmp = ctypes.CDLL(None).memcmp
    except (OSError, TypeError, AttributeError):  # a platform that has no such name in the process
        return None
    memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    return memcmp


_memcmp = _find_memcmp()
