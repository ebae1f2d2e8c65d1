"""The dense control: the same training without clustering, to be compared with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

_EPSILON = 1e-12


class DenseWeights:
    """Stands where an `edkm.Clustering` would, and clusters nothing.

    Arguments:
        model: all its parameters that want gradients are trained, in the units of a clustered one.
    """

    def __init__(self, model: nn.Module) -> None:
        self._rms = {
            parameter: _rms(parameter) for parameter in model.parameters() if parameter.requires_grad
        }

    def parameter_groups(self, learning_rate: float, *, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """One group a weight; its learning rate is `learning_rate` times its rms."""
        return [
            {
                "params": [parameter],
                "lr": learning_rate * rms,
                "eps": _EPSILON / rms,
                "weight_decay": weight_decay / rms,
            }
            for parameter, rms in self._rms.items()
        ]

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> None:
        """Scale all gradients so that the norm of gradient times rms is at most `max_norm`."""
        pairs = [(parameter.grad, rms) for parameter, rms in self._rms.items() if parameter.grad is not None]
        norm = torch.stack([gradient.float().norm() * rms for gradient, rms in pairs]).norm()
        for gradient, _ in pairs:
            gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))

    def step(self) -> None:
        """Nothing is carried from step to step."""

    def soft(self) -> AbstractContextManager[None]:
        """The weights as they are."""
        return nullcontext()

    def snapped(self) -> AbstractContextManager[None]:
        """The weights as they are."""
        return nullcontext()

    def num_dead_centroids(self) -> dict[str, int]:
        """There are no centroids."""
        return {}


def _rms(parameter: torch.Tensor) -> float:
    # A weight that starts at zero, a fresh bias, has no scale of its own yet.
    return float(parameter.detach().float().square().mean().sqrt()) or 1.0
