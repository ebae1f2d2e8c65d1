"""The 128-bit hash by which bytes are known."""

import ctypes

import torch
import xxhash
from torch import Tensor

_memory_view = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)
_READ_ONLY = 0x100  # PyBUF_READ


def digest_of(source: Tensor) -> bytes:
    """Return the xxh3-128 digest of the whole storage of `source`, 16 bytes."""
    return digest_of_storage(source.untyped_storage())


def digest_of_storage(storage: torch.UntypedStorage) -> bytes:
    """Return the xxh3-128 digest of all bytes of `storage`, 16 bytes.

    Read through a raw buffer: `Tensor.numpy()` would make the storage non-resizable for ever, which breaks
    FSDP2. A storage on another device is copied to the host first.
    """
    if storage.device.type != "cpu":
        storage = storage.cpu()  # type: ignore[no-untyped-call]
    return xxhash.xxh3_128_digest(_memory_view(storage.data_ptr(), storage.nbytes(), _READ_ONLY))


def digest_of_bytes(flat: Tensor) -> bytes:
    """Return the xxh3-128 digest of `flat`, contiguous uint8 `[n]` on the CPU, 16 bytes."""
    return xxhash.xxh3_128_digest(view_of(flat))


def view_of(flat: Tensor) -> memoryview:
    """Return the bytes of `flat`, contiguous uint8 `[n]` on the CPU, to be read while the tensor lives."""
    view: memoryview = _memory_view(flat.data_ptr(), flat.numel(), _READ_ONLY)
    return view
