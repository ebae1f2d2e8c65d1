"""AdamW wholly in the width of the parameters: what a 16-bit weight rounds away is kept beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_BETAS = (0.9, 0.95)
# What is computed in fp32 at a time, in elements: a few such chunks stay in a core's cache.
_CHUNK = 1 << 18


class CompensatedAdamW:
    """AdamW for 16-bit parameters in 10 bytes a weight, its gradient included: `MasterAdamW` takes 18 to 20.

    Beside each bfloat16 weight lies, as bfloat16 too, what its last roundings lost, so that the two together
    have 16 significant bits (Kahan's summation). The moments are bfloat16: with betas of 0.9 and 0.95 each
    step moves them by more than their spacing, so they do not stand still as they would with 0.999.

    Arguments:
        groups: parameter groups as torch's optimizers take them; each has `lr`, its peak, and may have `eps`
            and `weight_decay`. The parameters are bfloat16, contiguous and not sharded.

    Raises:
        TypeError: a parameter is not bfloat16.
    """

    def __init__(self, groups: Iterable[Mapping[str, Any]]) -> None:
        self._groups = [{"eps": 1e-8, "weight_decay": 0.0, **group} for group in groups]
        self._states = {each: _State.of(each) for group in self._groups for each in group["params"]}
        self._num_steps = 0

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Move every parameter by its gradient, and let go of the gradients.

        Arguments:
            factor: what the learning rates are multiplied with, 1 at their peak.
        """
        self._num_steps += 1
        corrections = [1 - beta**self._num_steps for beta in _BETAS]
        for group in self._groups:
            move = _Move(
                decay=1 - group["lr"] * factor * group["weight_decay"],
                length=group["lr"] * factor / corrections[0],
                scale=math.sqrt(corrections[1]),
                eps=group["eps"],
            )
            for parameter in group["params"]:
                if parameter.grad is not None:
                    move.apply(parameter, self._states[parameter])
                    parameter.grad = None


@dataclass(frozen=True)
class _State:
    """What is kept of a parameter, flat: moments, and what its roundings lost."""

    first: torch.Tensor
    second: torch.Tensor
    lost: torch.Tensor

    @staticmethod
    def of(parameter: nn.Parameter) -> _State:
        if parameter.dtype != torch.bfloat16:
            raise TypeError(
                f"CompensatedAdamW got a parameter of {parameter.dtype}: give bfloat16; "
                "MasterAdamW takes others"
            )
        return _State(*(parameter.new_zeros(parameter.numel()) for _ in range(3)))


@dataclass(frozen=True)
class _Move:
    """One step of AdamW, by the numbers that do not depend on the weight.

    Arguments:
        decay: factor on the weight.
        length: learning rate over the first moment's correction for its start at zero.
        scale: what the second moment's root is divided by, for the same reason.
        eps: added to it then.
    """

    decay: float
    length: float
    scale: float
    eps: float

    def apply(self, parameter: nn.Parameter, state: _State) -> None:
        assert parameter.grad is not None
        flat = [
            parameter.detach().view(-1),
            parameter.grad.reshape(-1),
            state.first,
            state.second,
            state.lost,
        ]
        parts = zip(*(torch.split(each, _CHUNK) for each in flat), strict=True)
        for weight, gradient, first, second, lost in parts:
            slope = gradient.float()
            mean = first.float().lerp_(slope, 1 - _BETAS[0])
            square = second.float().lerp_(slope.square_(), 1 - _BETAS[1])
            first.copy_(mean)
            second.copy_(square)
            exact = weight.float().add_(lost).mul_(self.decay)
            exact.addcdiv_(mean, square.sqrt_().div_(self.scale).add_(self.eps), value=-self.length)
            weight.copy_(exact)
            lost.copy_(exact.sub_(weight))
