"""What plain DKM would need: measured on a small weight, and scaled up."""

from typing import Any

import torch
from torch import nn

from bench.saved import storage_bytes
from edkm import dkm

ITERATIONS = 3
"""Of k-means in a forward pass, as Core ML Tools has it by default. It is the harder case: a recipe that
carries its centroids does with one."""

_SIZE = 512


def plain_dkm(num_weights: int, *, bits: int, iterations: int) -> dict[str, Any]:
    """Return the bytes that autograd keeps for so many bfloat16 weights, all clustered by plain operations in
    one forward pass.

    Every map has a row a weight, so that bytes are proportional to weights; the weights are not counted.
    """
    weight = nn.Parameter((torch.randn(_SIZE, _SIZE) * 0.02).bfloat16())
    centroids = torch.linspace(-0.045, 0.045, 1 << bits)
    kept = storage_bytes(lambda: dkm(weight, centroids, temperature=4e-5, iterations=iterations))
    per_weight = kept / weight.numel()
    return {
        "kept_bytes": round(per_weight * num_weights),
        "kept_bytes_per_weight": round(per_weight, 2),
        "how": f"measured on {_SIZE} x {_SIZE} and scaled up to {num_weights:,} weights",
    }
