"""Whether the store alone has a storage: nobody else can then read it, or write to it."""

import sys

import torch
from torch.utils._python_dispatch import _disable_current_modes

_use_count = getattr(torch._C, "_storage_Use_Count", None)  # private; without it nothing is the store's alone


def is_sole(storage: torch.UntypedStorage, *, num_aliases: int) -> bool:
    """Return whether `storage` is reached through `num_aliases` tensors, which the caller has, and the
    caller's own variable; False where that cannot be told.

    Memory that torch did not allocate itself (numpy's, dlpack's) has other owners, and so has shared memory.
    """
    if _use_count is None or not storage.resizable():
        return False
    counts = sys.getrefcount(storage), _use_count(storage._cdata)
    return counts == (_NUM_NAMES, _NUM_OWNERS + num_aliases) and not storage.is_shared()


def _count_alone() -> tuple[int, int]:
    """Count what a storage of one tensor and one variable has, both as `is_sole` does: its Python object has
    references, and the storage owners, that differ between releases of torch.

    Not under a mode that keeps what was made, nor under a tracer that looks at variables: a count that is too
    high would make what somebody else has the store's alone.
    """

    def count(storage: torch.UntypedStorage) -> tuple[int, int]:
        owners = _use_count(storage._cdata) if _use_count is not None else 0
        return sys.getrefcount(storage), owners - 1

    tracer, profiler = sys.gettrace(), sys.getprofile()
    sys.settrace(None)
    sys.setprofile(None)
    try:
        with _disable_current_modes():
            tensor = torch.empty(1)
            storage = tensor.untyped_storage()
            return count(storage)
    finally:
        sys.settrace(tracer)
        sys.setprofile(profiler)


_NUM_NAMES, _NUM_OWNERS = _count_alone()
