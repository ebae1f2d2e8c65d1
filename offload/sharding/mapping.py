"""Memory mapped from a file, copied where it is written to."""

import ctypes
import mmap
import os
import weakref

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_map = ctypes.CFUNCTYPE(
    ctypes.c_void_p,
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
    use_errno=True,
)(("mmap", _libc))
_unmap = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)(("munmap", _libc))
_FAILED = ctypes.c_void_p(-1).value


Mapping = ctypes.Array[ctypes.c_uint8]
"""Bytes of a file. Its end unmaps them."""


def map_private(file: int, num_bytes: int) -> Mapping:
    """Return the first bytes of an open file, 1 or more; what is written to them stays in this process.

    Python's and torch's own mappings keep the file open, or open it anew. This one keeps only what the file
    was opened as: a lock that was taken on it holds as long as the memory, and no file number is in use.

    Raises:
        OSError: no memory, or no more mappings for this process.
    """
    address = _map(None, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, file, 0)
    if address == _FAILED or address is None:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    memory = (ctypes.c_uint8 * num_bytes).from_address(address)
    weakref.finalize(memory, _unmap, address, num_bytes).atexit = False
    return memory


def tensor_on(mapping: Mapping) -> Tensor:
    """Return a tensor uint8 `[n]` on a storage of its own, which keeps the mapping alive."""
    return torch.frombuffer(mapping, dtype=torch.uint8)
