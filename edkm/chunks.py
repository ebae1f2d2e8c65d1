"""What is computed over a weight chunk by chunk, so that no temporary grows with it."""

from __future__ import annotations

import torch

CPU_CHUNK = 1 << 18
_CHUNK = 1 << 24


def chunks(flat: torch.Tensor, *, cpu_chunk: int = CPU_CHUNK) -> tuple[torch.Tensor, ...]:
    """Split `[N]` into views, at least one: on a CPU of `cpu_chunk` items, by default so few that they stay
    in a core's cache.
    """
    found: tuple[torch.Tensor, ...] = torch.split(flat, cpu_chunk if flat.device.type == "cpu" else _CHUNK)
    return found


def variance(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Variance of a weight of any shape, computed in `dtype`, float32 or float64: 0-d."""
    if weight.dtype == dtype:
        return weight.var(correction=0)
    parts = chunks(weight.reshape(-1))
    mean = torch.stack([part.to(dtype).sum() for part in parts]).sum() / weight.numel()
    squares = [part.to(dtype).sub_(mean).square_().sum() for part in parts]
    return torch.stack(squares).sum() / weight.numel()


def squared_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of the squares, of fp32 at least: 0-d float64."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    # `sum` adds in pairs; `norm` would lose four digits of a large weight in fp32, and be slow in float64.
    squares = [part.to(wide).square().sum() for part in chunks(tensor.reshape(-1))]
    return torch.stack(squares).sum().double()


def num_not_finite(tensor: torch.Tensor) -> torch.Tensor:
    """How many values are NaN or infinite: 0-d int64."""
    return torch.stack([(~part.isfinite()).sum() for part in chunks(tensor.reshape(-1))]).sum()
