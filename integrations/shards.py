"""Weights that are sharded over ranks, made whole on one of them to be written."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor


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
