"""Weights that FSDP spreads over ranks, as DTensors: what is computed from shards, and what needs them whole.

Every function here that takes a sharded tensor is a collective: all ranks that hold a shard call it. None of
them runs in a forward pass, which sees whole weights.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from edkm.chunks import num_not_finite, squared_sum
from edkm.errors import PaletteError


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this rank holds a part."""
    module = sys.modules.get("torch.distributed.tensor")  # without it there are none
    return module is not None and isinstance(tensor, module.DTensor)


def shard_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, which may be nothing; a plain tensor itself. No collective."""
    found: Any = tensor.detach()
    local: torch.Tensor = found.to_local() if is_sharded(found) else found
    return local


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor, on every rank; a plain tensor itself."""
    found: Any = tensor.detach()
    gathered: torch.Tensor = found.full_tensor() if is_sharded(found) else tensor
    return gathered


@torch.no_grad()
def summed(values: torch.Tensor, *, over: torch.Tensor) -> torch.Tensor:
    """Add up what each rank made of its shard, the same on every rank; nothing to add for a plain tensor.

    Arguments:
        values: of this rank's shard; changed in place.
        over: the tensor that was sharded.
    """
    for group in _groups(over):
        dist.all_reduce(values, group=group)
    return values


def require_finite(weight: torch.Tensor, *, attempt: str) -> None:
    """Check a weight of any shape, on every rank alike.

    Raises:
        PaletteError: it is NaN or infinite somewhere, so that `attempt` fails.
    """
    num_bad = int(summed(num_not_finite(shard_of(weight)), over=weight))
    if num_bad:
        raise PaletteError(f"cannot {attempt}: {num_bad} of its {weight.numel()} values are NaN or infinite")


@torch.no_grad()
def squared_sums(tensors: Sequence[torch.Tensor]) -> list[float]:
    """Sum of the squares of each of several tensors, plain and sharded ones, with one exchange a mesh."""
    if not tensors:
        return []
    sums = torch.stack([squared_sum(shard_of(tensor)) for tensor in tensors])
    places: dict[tuple[Any, ...], list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault(_groups(tensor), []).append(place)
    for alike in places.values():
        sums[alike] = summed(sums[alike], over=tensors[alike[0]])
    return [float(each) for each in sums.tolist()]


def _groups(tensor: Any) -> tuple[dist.ProcessGroup, ...]:
    """The process groups over which a tensor is split; over others it is replicated."""
    if not is_sharded(tensor):
        return ()
    return tuple(
        tensor.device_mesh.get_group(dimension)
        for dimension, placement in enumerate(tensor.placements)
        if not placement.is_replicate()
    )
