"""AdamW whose small updates are not lost in a 16-bit weight, and its learning rate over time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from integrations.shards import spread

_BETAS = (0.9, 0.95)


class MasterAdamW:
    """AdamW on fp32 masters of 16-bit parameters; wider parameters are their own masters.

    A bf16 weight of 0.02 has neighbours 1.2e-4 apart: an update of 5e-5 rounds away, every time. The masters
    sum such updates up, and the parameter follows them rounded.

    Arguments:
        groups: parameter groups as torch's optimizers take them; each has a `lr`, its peak.
    """

    def __init__(self, groups: Iterable[Mapping[str, Any]]) -> None:
        self._pairs: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._adamw = torch.optim.AdamW(
            [{**group, "params": self._masters(group["params"])} for group in groups], betas=_BETAS
        )
        self._peaks = [float(group["lr"]) for group in self._adamw.param_groups]

    def step(self, factor: float) -> None:
        """Move every parameter by its gradient, and let go of the gradients.

        Arguments:
            factor: what the learning rates are multiplied with, 1 at their peak.
        """
        for group, peak in zip(self._adamw.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        for parameter, master in self._pairs:
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, master in self._pairs:
                parameter.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        """Moments, peaks and masters: tensors and numbers only."""
        return {
            "adamw": self._adamw.state_dict(),
            "peaks": list(self._peaks),
            "masters": [master for _, master in self._pairs],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, over the same parameters; whole tensors are spread like those."""
        parameters = [each for group in self._adamw.param_groups for each in group["params"]]
        moments = {
            place: {name: spread(value, like=parameters[place]) for name, value in of_one.items()}
            for place, of_one in state["adamw"]["state"].items()
        }
        self._adamw.load_state_dict({**state["adamw"], "state": moments})
        self._peaks = list(state["peaks"])
        with torch.no_grad():
            for (_, master), saved in zip(self._pairs, state["masters"], strict=True):
                master.copy_(spread(saved, like=master))

    def _masters(self, parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
        return [self._master(parameter) for parameter in parameters]

    def _master(self, parameter: nn.Parameter) -> torch.Tensor:
        if parameter.dtype not in (torch.bfloat16, torch.float16):
            return parameter
        master = parameter.detach().float()
        self._pairs.append((parameter, master))
        return master


def cosine_factor(step: int, *, num_steps: int, warmup_steps: int) -> float:
    """Learning rate of a step as a fraction of its peak: a linear warm-up, then half a cosine down to zero.

    Arguments:
        step: from 0.
        num_steps: of the whole run.
        warmup_steps: over which the rate rises.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup_steps) / max(1, num_steps - warmup_steps)))
