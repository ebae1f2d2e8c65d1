"""Refuse what would not fit, before it starts."""

import shutil
from pathlib import Path

import psutil

GIB = 1 << 30
# The interpreter with PyTorch and Transformers, and what the heap does not give back.
_BASE_BYTES = GIB


def require_memory(num_bytes: int, *, what: str) -> None:
    """Check that so many bytes beside PyTorch's own are free.

    Raises:
        SystemExit: they are not.
    """
    needed, free = num_bytes + _BASE_BYTES, psutil.virtual_memory().available
    if needed > free:
        raise SystemExit(
            f"{what} needs about {needed / GIB:.1f} GiB of memory, {free / GIB:.1f} are free: "
            "end what else runs here, or take a larger machine"
        )


def require_disk(num_bytes: int, *, folder: Path, what: str) -> None:
    """Check that so many bytes are free where `folder` lies.

    Raises:
        SystemExit: they are not.
    """
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise SystemExit(
            f"{what} needs about {num_bytes / GIB:.1f} GiB on disk, {free / GIB:.1f} are free in {folder}: "
            "name another folder in TMPDIR"
        )
