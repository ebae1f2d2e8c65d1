"""AdamW whose small updates are not lost in a 16-bit weight, and its learning rate over time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

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
        self._make_moments()

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
        """Moments and masters, which are this optimizer's own and may be filled in place, and the peaks."""
        moments = {
            f"{place}.{name}": value
            for place, parameter in enumerate(self._parameters())
            for name, value in self._adamw.state[parameter].items()
        }
        masters = {f"master.{place}": master for place, (_, master) in enumerate(self._pairs)}
        return {**moments, **masters, "peaks": list(self._peaks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, over the same parameters; its tensors are in place already."""
        self._peaks = list(state["peaks"])

    def _parameters(self) -> list[torch.Tensor]:
        return [each for group in self._adamw.param_groups for each in group["params"]]

    def _make_moments(self) -> None:
        # AdamW makes them at a parameter's first gradient; a checkpoint is read into them before that.
        for parameter in self._parameters():
            self._adamw.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }

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
