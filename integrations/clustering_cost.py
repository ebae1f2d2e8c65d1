"""What clustering alone asks autograd to keep in one training step: the plain layer and the fused one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from edkm import DKMConfig, cluster, dkm, fused_dkm
from integrations.transformers import load_dense
from offload import SavedTensorStore

_Layer = Callable[..., tuple[torch.Tensor, torch.Tensor]]
LAYERS: Mapping[str, _Layer] = {"plain DKM": dkm, "the fused step": fused_dkm}


def clustering_cost(model: str, *, bits: int, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Cluster all decoder linears of a model once, forward and backward, by each of the two layers.

    Arguments:
        model: directory or hub name of a dense model.
        bits: per weight.
        dtype: of the weights.

    Returns:
        By layer: `saved_bytes` that autograd asked to keep, the weights themselves left out,
        `peak_held_bytes` by a store that uniquifies, `seconds` of the step without a store.
    """
    config = DKMConfig(bits=bits)
    clustered = load_dense(model, dtype=dtype)
    cluster(clustered, config)
    problems: list[tuple[Any, Any]] = [
        (module.original, each.centroids)
        for module in clustered.modules()
        if isinstance(module, torch.nn.utils.parametrize.ParametrizationList)
        for each in module
    ]
    return {name: _cost(layer, problems, config=config) for name, layer in LAYERS.items()}


def _cost(layer: _Layer, problems: Sequence[tuple[Any, Any]], *, config: DKMConfig) -> dict[str, Any]:
    def forward() -> torch.Tensor:
        soft = [
            layer(
                weight,
                centroids,
                temperature=float(weight.detach().float().var()) * config.temperature,
                iterations=config.iterations,
            )[0]
            for weight, centroids in problems
        ]
        return torch.stack([each.float().sum() for each in soft]).sum()

    with SavedTensorStore(uniquify=True) as store:
        loss = forward()
    held = store.stats
    loss.backward()  # type: ignore[no-untyped-call]
    began = time.perf_counter()
    forward().backward()  # type: ignore[no-untyped-call]
    return {
        "saved_bytes": held.saved_bytes,
        "peak_held_bytes": held.peak_held_bytes,
        "seconds": round(time.perf_counter() - began, 3),
    }
