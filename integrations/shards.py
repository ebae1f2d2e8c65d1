"""States of training over ranks: gathered to the first one to be written, spread again when read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def gathered(state: Any, *, keep: bool) -> Any:
    """A state with its DTensors whole and on the CPU; every rank calls it.

    It is not torch's distributed checkpoint, whose files are pickled, and which wants the optimizer's
    parameters to be the model's: masters of 16-bit weights are not.

    Arguments:
        state: nested dicts and lists; the same keys in the same order on every rank.
        keep: whether this rank wants the result; it is empty elsewhere, so that only one holds it all.
    """
    if isinstance(state, DTensor):
        whole = state.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(state, Mapping):
        found = {name: gathered(value, keep=keep) for name, value in state.items()}
        return found if keep else {}
    if isinstance(state, list):
        members = [gathered(value, keep=keep) for value in state]
        return members if keep else []
    return state


def spread(tensor: torch.Tensor, *, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole tensor that every rank has; itself where `like` is no DTensor."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def make_whole(model: nn.Module, *, keep: bool) -> None:
    """Put whole parameters on the CPU in the place of sharded ones; every rank calls it.

    Arguments:
        model: no longer run after this; tied parameters stay tied.
        keep: whether this rank wants them; elsewhere the shards stay.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if isinstance(parameter, DTensor):
                if parameter not in made:
                    made[parameter] = _whole(parameter)
                if keep:
                    module.register_parameter(name, made[parameter])


def _whole(parameter: Any) -> nn.Parameter:
    return nn.Parameter(parameter.detach().full_tensor().cpu(), requires_grad=parameter.requires_grad)
