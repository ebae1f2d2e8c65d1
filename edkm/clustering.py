"""The handle of a clustered model: steps, learning rates, gradient norm, soft and snapped losses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from edkm.parametrization import ClusteredWeight
from edkm.shards import shard_of, squared_sums

# As small as fp32 allows: the bound on Adam's step is to come from the gradient alone.
_EPSILON = 1e-12


class Clustering:
    """What `cluster` returns. All its state lies in the model's `state_dict`: tensors only.

    Arguments:
        model: the clustered model; not owned.
        weights: the parametrization of each clustered weight and the module that has the dense weight in
            front of it as `original`, by the names of the modules that share it. With none, training is that
            of a dense model in the same units.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, tuple[ClusteredWeight, nn.Module]]) -> None:
        self._model = model
        self._weights = dict(weights)

    def step(self) -> None:
        """Follow an optimizer step, once and after the optimizer's: centroids and temperature move on."""
        for parametrization, _ in self._weights.values():
            parametrization.commit()

    def parameter_groups(self, learning_rate: float, *, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Groups for AdamW over all trained parameters of the model, one a parameter.

        Arguments:
            learning_rate: in units of each parameter's root mean square, a step.
            weight_decay: in units of `learning_rate`: what a weight loses of itself a step is the product.

        Returns:
            Groups with `lr`, `eps` and `weight_decay`: a model whose weights are scaled up and down without
            changing its function trains alike.
        """
        groups = []
        parameters = self._trained()
        for parameter, rms in zip(parameters, _scales(parameters), strict=True):
            # AdamW multiplies the decay with `lr`, which has the weight's unit already.
            groups.append(
                {
                    "params": [parameter],
                    "lr": learning_rate * rms,
                    "eps": _EPSILON / rms,
                    "weight_decay": weight_decay / rms,
                }
            )
        return groups

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale all gradients so that the norm of (gradient times root mean square of its weight) is at most
        `max_norm`, over all ranks where they are sharded.

        Returns:
            The norm before, 0-d fp32.
        """
        parameters = [parameter for parameter in self._trained() if parameter.grad is not None]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        pairs = zip(squared_sums(gradients), _scales(parameters), strict=True)
        norm = math.sqrt(sum(square * rms**2 for square, rms in pairs))
        factor = min(1.0, max_norm / (norm + 1e-6))
        for gradient in gradients:
            shard_of(gradient).mul_(factor)
        return torch.tensor(norm)

    @torch.no_grad()
    def num_dead_centroids(self) -> dict[str, int]:
        """Centroids that no weight is nearest to, by the clustered weight's name; all ranks call it where
        weights are sharded.
        """
        return {
            # Looked up now: FSDP puts other parameters in the place of those that were clustered.
            name: int((parametrization.palette(_original(module)).counts() == 0).sum())
            for name, (parametrization, module) in self._weights.items()
            if parametrization.trained_soft
        }

    @contextmanager
    def soft(self) -> Iterator[None]:
        """Run on the weights that training sees, in evaluation mode too."""
        with self._forced(soft=True):
            yield

    @contextmanager
    def snapped(self) -> Iterator[None]:
        """Run on the weights that `palettize` will write, in training mode too; they have no gradient."""
        with self._forced(soft=False):
            yield

    @contextmanager
    def _forced(self, *, soft: bool) -> Iterator[None]:
        before = [parametrization.forced_soft for parametrization, _ in self._weights.values()]
        for parametrization, _ in self._weights.values():
            parametrization.forced_soft = soft
        try:
            yield
        finally:
            for (parametrization, _), forced in zip(self._weights.values(), before, strict=True):
                parametrization.forced_soft = forced

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._model.parameters() if parameter.requires_grad]


def _original(module: nn.Module) -> nn.Parameter:
    weight = module.original
    assert isinstance(weight, nn.Parameter)
    return weight


def _scales(parameters: list[nn.Parameter]) -> list[float]:
    """Root mean square of each parameter, of all its shards."""
    squares = zip(squared_sums(parameters), parameters, strict=True)
    found = [math.sqrt(square / max(1, parameter.numel())) for square, parameter in squares]
    # A fresh bias is zero and has no scale of its own yet; one that is not finite is the loss's to report.
    return [rms if rms > 0 and math.isfinite(rms) else 1.0 for rms in found]
