"""Differentiable k-means as plain autograd operations: the paper's layer on one page.

The distance of each weight to each centroid becomes a soft assignment, the attention A; each centroid moves
to the mean of the weights, weighted by it; after the last iteration the layer runs on A C (eDKM, section on
DKM).
"""

from __future__ import annotations

import functools
import math

import torch


def dkm(
    weight: torch.Tensor,
    centroids: torch.Tensor,
    *,
    temperature: float | torch.Tensor,
    iterations: int,
    epsilon: float = 0.0,
    fixed_zero: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cluster a weight softly; gradients flow through every iteration (eDKM, section on DKM).

    A centroid that no weight attends to keeps its place. All arithmetic is in fp32 at least, under autocast
    too; call `backward` outside of it, as PyTorch asks: inside, its matrix products are rounded to 16 bits.

    Arguments:
        weight: float16, bfloat16, float32 or float64, any shape; taken as rows of d neighbouring weights.
        centroids: `[K]`, `[K, d]`, or `[G, K, d]` for G groups of output channels (equal parts of the first
            dimension).
        temperature: of the attention, in the square of the weight's unit; above 0.
        iterations: of k-means, 1 or more.
        epsilon: stop when no coordinate of a centroid moved by this much, in the weight's unit; 0 runs every
            iteration.
        fixed_zero: hold the first centroid of each group at zero, whatever its value.

    Returns:
        The clustered weight (shape and dtype of `weight`), A C with A from the last iteration's starting
        centroids and C moved once more; and C in the shape of `centroids`, fp32 or float64, with its
        gradient.

    Raises:
        TypeError: weight or centroids are not real floating point of 16 bits or more.
        ValueError: shapes that do not fit, a temperature or a number of iterations that is not above 0.
    """
    groups = as_groups(centroids)
    check(weight, groups, temperature=temperature, iterations=iterations, epsilon=epsilon)
    wide = torch.promote_types(torch.promote_types(weight.dtype, centroids.dtype), torch.float32)
    # Autocast would run the sums over weights in 16 bits.
    with torch.autocast(weight.device.type, enabled=False):
        rows = weight.reshape(groups.shape[0], -1, groups.shape[2]).to(wide)
        means = _pinned(groups.to(wide)) if fixed_zero else groups.to(wide)
        for _ in range(iterations):
            attention = _attention(rows, means, temperature=temperature, by_row=weight.element_size() <= 2)
            before, means = means, _weighted_means(rows, attention, otherwise=means)
            if fixed_zero:
                means = _pinned(means)
            if epsilon and float((means - before).detach().abs().max()) < epsilon:
                break
        clustered = (attention @ means).reshape(weight.shape).to(weight.dtype)
    return clustered, means.reshape(centroids.shape)


def _attention(
    rows: torch.Tensor, centroids: torch.Tensor, *, temperature: float | torch.Tensor, by_row: bool
) -> torch.Tensor:
    """Softmax of the squared distances over the centroids: `[G, N, K]`.

    Each row is a function of its weight's bits. Where those are 16 the rows repeat, and lying one after the
    other they can be kept once (eDKM, uniquification); others lie the way that is several times faster to
    compute.
    """
    if by_row:
        return torch.softmax(_distance(rows.unsqueeze(2), centroids.unsqueeze(1)) / -temperature, dim=2)
    distance = _distance(rows.unsqueeze(1), centroids.unsqueeze(2))
    return torch.softmax(distance / -temperature, dim=1).transpose(1, 2)


def _distance(rows: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Squared distance along the last dimension; multiplied out instead, the difference would cancel."""
    coordinates = zip(rows.unbind(-1), centroids.unbind(-1), strict=True)
    return functools.reduce(torch.add, [(row - centroid).square() for row, centroid in coordinates])


def _weighted_means(rows: torch.Tensor, attention: torch.Tensor, *, otherwise: torch.Tensor) -> torch.Tensor:
    """Mean of the rows under each centroid's attention, `[G, K, d]`; without any attention, `otherwise`."""
    mass = attention.sum(dim=1).unsqueeze(2)
    # Below this the slope of the division, 1 / mass**2, would overflow.
    occupied = mass > math.sqrt(torch.finfo(mass.dtype).tiny)
    # A matrix product may add millions of terms one after the other; `sum` adds them in pairs.
    sums = [(attention * coordinate.unsqueeze(2)).sum(dim=1) for coordinate in rows.unbind(2)]
    return torch.where(occupied, torch.stack(sums, dim=2) / torch.where(occupied, mass, 1.0), otherwise)


def _pinned(centroids: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(centroids[:, :1]), centroids[:, 1:]], dim=1)


def as_groups(centroids: torch.Tensor) -> torch.Tensor:
    """See centroids as `[G, K, d]`."""
    if not 1 <= centroids.dim() <= 3 or 0 in centroids.shape:
        raise ValueError(
            f"dkm got centroids of shape {list(centroids.shape)}: give [K], [K, d] or [G, K, d], none 0"
        )
    if centroids.dim() == 1:
        return centroids.reshape(1, -1, 1)
    return centroids if centroids.dim() == 3 else centroids.unsqueeze(0)


def check(
    weight: torch.Tensor,
    groups: torch.Tensor,
    *,
    temperature: float | torch.Tensor,
    iterations: int,
    epsilon: float,
) -> None:
    """Raise what `dkm` says it raises; `groups` are the centroids as `[G, K, d]`."""
    for name, tensor in (("weight", weight), ("centroids", groups)):
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise TypeError(
                f"dkm got a {name} of {tensor.dtype}: give a real floating-point tensor of 16 bits or more"
            )
    num_groups, _, length = groups.shape
    num_channels = weight.shape[0] if weight.dim() else 1
    if num_channels % num_groups or (weight.numel() // num_groups) % length:
        raise ValueError(
            f"dkm got a weight of shape {list(weight.shape)} for {num_groups} groups of vectors of length "
            f"{length}: the first dimension must part into the groups, and each group into the vectors"
        )
    # A tensor's value is not looked at: that would wait for the device.
    if not isinstance(temperature, torch.Tensor) and not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"dkm got the temperature {temperature}: give a finite number above 0")
    if iterations < 1 or not epsilon >= 0:
        raise ValueError(
            f"dkm got {iterations} iterations, epsilon {epsilon}: give at least 1, and 0 or above"
        )
