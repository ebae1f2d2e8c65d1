"""Starting centroids: k-means on a histogram of the weights, or on a sample of vectors of weights."""

from __future__ import annotations

import torch

_MAX_ROUNDS = 200
_MAX_VECTORS = 1 << 16
_MAX_VECTOR_ROUNDS = 30
# Below the first 20 bits of a float32 there is less than a two-thousandth of its value.
_DROPPED_BITS = 12


def starting_centroids(
    weight: torch.Tensor, *, num_centroids: int, vector_length: int = 1, num_groups: int = 1
) -> torch.Tensor:
    """Find centroids by k-means; the same weight always gives the same ones.

    Arguments:
        weight: finite, floating point, its first dimension a multiple of `num_groups`.
        num_centroids: K; fewer distinct weights than that leave centroids that repeat.
        vector_length: d.
        num_groups: G.

    Returns:
        `[G, K, d]` fp32 (float64 for a float64 weight), sorted for d = 1.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    groups = weight.detach().reshape(num_groups, -1, vector_length)
    if vector_length == 1:
        found = [_scalars(group.flatten(), num_centroids) for group in groups]
    else:
        found = [_vectors(_sampled(group).to(wide), num_centroids) for group in groups]
    return torch.stack(found).to(wide)


def _scalars(values: torch.Tensor, num_centroids: int) -> torch.Tensor:
    """K-means in one dimension, `[K, 1]`: Lloyd's rounds on the sorted bins of a histogram."""
    means, counts = _histogram(values)
    if means.numel() <= num_centroids:
        return torch.cat([means, means[-1:].expand(num_centroids - means.numel())]).unsqueeze(1)
    total = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    moment = torch.cat([counts.new_zeros(1), (counts * means).cumsum(0)])
    centroids = _spread(means, counts, num_centroids)
    for _ in range(_MAX_ROUNDS):
        inner = torch.searchsorted(means, (centroids[1:] + centroids[:-1]) / 2, right=True)
        borders = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), means.numel())])
        mass = total[borders].diff()
        moved = torch.where(mass > 0, moment[borders].diff() / mass.clamp(min=1), centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids.unsqueeze(1)


def _histogram(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and count of each bin that has weights in it, float64, sorted.

    A bin is a 16-bit value, or the first 20 bits of a wider one: bins get narrower towards zero as weights
    get denser, and a far outlier costs the others no resolution.
    """
    narrow = values.element_size() == 2
    patterns = values.view(torch.int16) if narrow else values.float().view(torch.int32) >> _DROPPED_BITS
    half = 1 << (15 if narrow else 31 - _DROPPED_BITS)
    # Read as integers, negative floats count backwards.
    keys = torch.where(patterns < 0, -half - 1 - patterns, patterns).int() + half
    counts = torch.bincount(keys, minlength=2 * half).double()
    sums = torch.bincount(keys, weights=values.double(), minlength=2 * half)
    filled = counts > 0
    means = sums[filled] / counts[filled]
    return means, counts[filled]


def _spread(means: torch.Tensor, counts: torch.Tensor, num_centroids: int) -> torch.Tensor:
    """First centroids: as dense as the cube root of the weights' density (Panter and Dite's best)."""
    gaps = means.diff().clamp(min=torch.finfo(means.dtype).tiny)
    widths = torch.cat([gaps[:1], (gaps[1:] + gaps[:-1]) / 2, gaps[-1:]])
    share = (counts * widths.square()).pow(1 / 3).cumsum(0)
    levels = (torch.arange(num_centroids, device=means.device, dtype=means.dtype) + 0.5) / num_centroids
    places = torch.searchsorted(share, levels * share[-1]).clamp(max=means.numel() - 1)
    return means[places]


def _sampled(rows: torch.Tensor) -> torch.Tensor:
    return rows[:: -(-rows.shape[0] // _MAX_VECTORS)]


def _vectors(rows: torch.Tensor, num_centroids: int) -> torch.Tensor:
    """K-means of vectors, `[K, d]`: starts far apart (k-means++), then Lloyd's rounds."""
    centroids = _far_apart(rows, num_centroids)
    for _ in range(_MAX_VECTOR_ROUNDS):
        nearest = torch.cdist(rows, centroids).argmin(dim=1)
        mass = torch.bincount(nearest, minlength=num_centroids).unsqueeze(1)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, rows)
        moved = torch.where(mass > 0, sums / mass.clamp(min=1), centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def _far_apart(rows: torch.Tensor, num_centroids: int) -> torch.Tensor:
    # A generator of its own: neither does it depend on the caller's random state, nor move it.
    draws = torch.rand(num_centroids, generator=torch.Generator().manual_seed(0)).to(rows)
    chosen = [rows[rows.shape[0] // 2]]
    distance = (rows - chosen[0]).square().sum(dim=1)
    for draw in draws[1:]:
        reached = distance.cumsum(0)
        place = torch.searchsorted(reached, draw * reached[-1]).clamp(max=rows.shape[0] - 1)
        chosen.append(rows[place])
        distance = torch.minimum(distance, (rows - rows[place]).square().sum(dim=1))
    return torch.stack(chosen)
