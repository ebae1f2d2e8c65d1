"""One policy a file; `base.py` has the contract. A new policy is a new file and a name in `POLICIES`."""

from collections.abc import Callable, Mapping
from pathlib import Path

from offload.sharding.base import Sharding
from offload.sharding.local import Local


def _shared_memory() -> Sharding:
    from offload.sharding.shared_memory import SharedMemory  # not on systems without file locks

    return SharedMemory()


POLICIES: Mapping[str, Callable[[], Sharding]] = {"shared-memory": _shared_memory}


def sharding_of(*, shard: bool | str | Sharding) -> Sharding:
    """Return the policy that `shard` names: none, the one that suits this machine, a name or a policy."""
    if isinstance(shard, Sharding):
        return shard
    if isinstance(shard, bool):
        return _shared_memory() if shard and Path("/dev/shm").is_dir() else Local()
    if shard not in POLICIES:
        names = ", ".join(map(repr, POLICIES))
        raise ValueError(f"SavedTensorStore: shard is {shard!r}; give True, False, {names} or a Sharding")
    return POLICIES[shard]()
