"""One policy a file; `base.py` has the contract. A new policy is a new file and a name in `POLICIES`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from offload.sharding.base import Sharding
from offload.sharding.local import Local

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_Group = Any  # a process group or None; torch without distributed has no such type


def _auto(group: _Group) -> Sharding:
    from offload.sharding.by_host import ByHost

    within = _shared_memory(group) if Path("/dev/shm").is_dir() else Local()
    return ByHost(within=within, between=lambda: _all_gather(group), group=group)


def _all_gather(group: _Group) -> Sharding:
    from offload.sharding.all_gather import AllGather  # not where torch has no distributed

    return AllGather(group=group)


def _shared_memory(group: _Group) -> Sharding:
    from offload.sharding.shared_memory import SharedMemory  # not on systems without file locks

    return SharedMemory(group=group)


POLICIES: Mapping[str, Callable[[_Group], Sharding]] = {
    "auto": _auto,
    "all-gather": _all_gather,
    "shared-memory": _shared_memory,
}


def sharding_of(*, shard: bool | str | Sharding, group: "dist.ProcessGroup | DeviceMesh | None") -> Sharding:
    """Return the policy that `shard` names, for the ranks of `group`: none, the one that suits where they
    are, or a policy.
    """
    if group is not None and (shard is False or isinstance(shard, Sharding)):
        raise ValueError(
            f"SavedTensorStore: group is given beside shard={shard!r}; give shard=True or the name of a "
            "policy, or name the group to the policy itself"
        )
    if isinstance(shard, Sharding):
        return shard
    if shard is False:
        return Local()
    name = "auto" if shard is True else shard
    if name not in POLICIES:
        names = ", ".join(map(repr, POLICIES))
        raise ValueError(f"SavedTensorStore: shard is {shard!r}; give True, False, {names} or a Sharding")
    return POLICIES[name](_group_of_mesh(group))


def _group_of_mesh(group: "dist.ProcessGroup | DeviceMesh | None") -> _Group:
    num_dimensions = getattr(group, "ndim", None)
    if num_dimensions is None:
        return group
    if num_dimensions != 1:
        raise ValueError(
            f"SavedTensorStore: group is a mesh of {num_dimensions} dimensions, along each of which other "
            'tensors are equal; give one of them, mesh["name"]'
        )
    return group.get_group()  # type: ignore[union-attr]
