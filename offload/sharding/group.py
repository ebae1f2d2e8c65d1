"""The ranks of a job, as torch knows them."""

import os
from pathlib import Path

import torch.distributed as dist
import xxhash


def group_of(group: "dist.ProcessGroup | None") -> "dist.ProcessGroup | None":
    """Return `group`, all ranks where it is None; None where there is no other rank in it."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    chosen = group or dist.group.WORLD
    return chosen if chosen is not None and dist.get_world_size(chosen) > 1 else None


def group_key(group: "dist.ProcessGroup") -> str:
    """Return a name for the ranks of `group` that they all find alike."""
    return xxhash.xxh3_64_hexdigest(str(dist.get_process_group_ranks(group)).encode())


def host_name() -> str:
    """Return a name of this machine since it was started, the same for all its ranks and for no other's."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else os.uname().nodename


def job_store() -> "dist.distributed_c10d.Store":
    """Return the store that the job's ranks met through."""
    # No public name gives it; what is put there is under names of our own.
    store: dist.distributed_c10d.Store = dist.distributed_c10d._get_default_store()
    return store
