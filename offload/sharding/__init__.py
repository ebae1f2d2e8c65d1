"""One policy a file; `base.py` has the contract. A new policy is a new file and a name in `POLICIES`."""

from collections.abc import Callable, Mapping
from pathlib import Path

from offload.sharding.base import Sharding
from offload.sharding.local import Local


def _auto() -> Sharding:
    from offload.sharding.by_host import ByHost

    within = _shared_memory() if Path("/dev/shm").is_dir() else Local()
    return ByHost(within=within, between=_all_gather)


def _all_gather() -> Sharding:
    from offload.sharding.all_gather import AllGather  # not where torch has no distributed

    return AllGather()


def _shared_memory() -> Sharding:
    from offload.sharding.shared_memory import SharedMemory  # not on systems without file locks

    return SharedMemory()


POLICIES: Mapping[str, Callable[[], Sharding]] = {
    "auto": _auto,
    "all-gather": _all_gather,
    "shared-memory": _shared_memory,
}


def sharding_of(*, shard: bool | str | Sharding) -> Sharding:
    """Return the policy that `shard` names: none, the one that suits where the ranks are, or a policy."""
    if isinstance(shard, Sharding):
        return shard
    if isinstance(shard, bool):
        return _auto() if shard else Local()
    if shard not in POLICIES:
        names = ", ".join(map(repr, POLICIES))
        raise ValueError(f"SavedTensorStore: shard is {shard!r}; give True, False, {names} or a Sharding")
    return POLICIES[shard]()
