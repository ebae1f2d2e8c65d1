"""Starting centroids: k-means on a histogram of the weights, or on a sample of vectors of weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from edkm.patterns import pattern_counts, pattern_values
from edkm.shards import is_sharded, require_finite, shard_of, summed, whole

_MAX_ROUNDS = 50
_MAX_CELLS = 512
_CHUNK = 1 << 21
_MAX_SORTED = 1 << 16
_MAX_VECTORS = 1 << 16
_MAX_VECTOR_ROUNDS = 30
# Beyond the first 20 bits of a float32 there is less than a two-thousandth of its value.
_DROPPED_BITS = 12


def starting_centroids(
    weight: torch.Tensor, *, num_centroids: int, vector_length: int = 1, num_groups: int = 1
) -> torch.Tensor:
    """Find centroids by k-means; the same weight always gives the same ones, on any number of ranks.

    Of a weight that is sharded over ranks, all of which call this, each counts the 16-bit values of its
    shard, and the counts are added up: they are whole numbers, so that it does not matter who counted what.
    Sums over wider values would depend on how they are parted, and vectors and groups reach over borders of
    shards: those weights are gathered.

    Arguments:
        weight: floating point, its first dimension a multiple of `num_groups`.
        num_centroids: K; fewer distinct weights than that leave centroids that repeat.
        vector_length: d.
        num_groups: G.

    Returns:
        `[G, K, d]` fp32 (float64 for a float64 weight), sorted for d = 1.

    Raises:
        PaletteError: a value is NaN or infinite.
    """
    require_finite(weight, attempt=f"find centroids of a weight of shape {list(weight.shape)}")
    wide = torch.promote_types(weight.dtype, torch.float32)
    if is_sharded(weight) and weight.element_size() == 2 and vector_length == num_groups == 1:
        counts = summed(pattern_counts(shard_of(weight).flatten(), weight.dtype), over=weight)
        return _scalars(*_of_patterns(counts, weight.dtype), num_centroids=num_centroids)[None].to(wide)
    weight = whole(weight)
    groups = weight.detach().reshape(num_groups, -1, vector_length)
    if vector_length == 1:
        found = [_scalars(*_histogram(group.flatten()), num_centroids=num_centroids) for group in groups]
    else:
        found = [_vectors(_sampled(group).to(wide), num_centroids) for group in groups]
    return torch.stack(found).to(wide)


def _scalars(means: torch.Tensor, counts: torch.Tensor, *, num_centroids: int) -> torch.Tensor:
    """K-means in one dimension, `[K, 1]`: the best on a coarse histogram, then rounds on the fine one."""
    if means.numel() <= num_centroids:
        return torch.cat([means, means[-1:].expand(num_centroids - means.numel())]).unsqueeze(1)
    centroids = _best(*_coarse(means, counts), num_centroids=num_centroids)
    for _ in range(_MAX_ROUNDS):
        nearest = torch.bucketize(means, (centroids[1:] + centroids[:-1]) / 2)
        moved = _means(means, counts, nearest, otherwise=centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids.unsqueeze(1)


def _histogram(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and count of each bin that has weights in it, float64, sorted.

    A bin is a value where those are 16 bits wide or few, else the first 20 bits of its distance from the
    mean: bins are narrow where weights are dense, and a far outlier costs the others no resolution.
    """
    if values.element_size() == 2:
        return _of_patterns(pattern_counts(values, values.dtype), values.dtype)
    if values.numel() <= _MAX_SORTED:  # fewer than there are bins
        means, counts = torch.unique(values.double(), return_counts=True)
        return means, counts.double()
    half = 1 << (31 - _DROPPED_BITS)
    centre = float(values.mean())
    counts = torch.zeros(2 * half, dtype=torch.float64, device=values.device)
    sums = torch.zeros_like(counts)
    # In pieces: temporaries the size of the weight would cost more than the counting.
    for chunk in torch.split(values, _CHUNK):
        keys = ((chunk - centre).float().view(torch.int32) >> _DROPPED_BITS) + half
        counts += torch.bincount(keys, minlength=2 * half)
        sums += torch.bincount(keys, weights=chunk.double(), minlength=2 * half)
    filled = counts > 0
    means, order = (sums[filled] / counts[filled]).sort()
    return means, counts[filled][order]


def _of_patterns(counts: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The histogram that the counts of patterns of a dtype make."""
    patterns = counts.nonzero().squeeze(1)
    means, order = pattern_values(patterns, dtype).double().sort()
    return means, counts[patterns][order].double()


def _coarse(means: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge neighbouring bins into at most `_MAX_CELLS`.

    Half of the cells go where the weights are, half where centroids of a large palette would be, which is as
    dense as the cube root of the weights (Panter and Dite): a lone outlier gets a cell, and leaves some to
    the rest.
    """
    if means.numel() <= _MAX_CELLS:
        return means, counts
    gaps = means.diff()
    widths = torch.cat([gaps[:1], (gaps[1:] + gaps[:-1]) / 2, gaps[-1:]])
    spread = (counts * widths.square()).pow(1 / 3)
    place = (counts / counts.sum() + spread / spread.sum()).cumsum(0)
    cells = (place / place[-1] * (_MAX_CELLS - 1)).long()
    merged = torch.bincount(cells, weights=counts, minlength=_MAX_CELLS)
    sums = torch.bincount(cells, weights=counts * means, minlength=_MAX_CELLS)
    filled = merged > 0
    return sums[filled] / merged[filled], merged[filled]


def _best(means: torch.Tensor, counts: torch.Tensor, *, num_centroids: int) -> torch.Tensor:
    """The best centroids of sorted points, `[K]`, by dynamic programming over where a cluster ends."""
    centred = means - (counts * means).sum() / counts.sum()
    moments = [counts, counts * centred, counts * centred.square()]
    count, total, square = (F.pad(moment.cumsum(0), (1, 0)) for moment in moments)
    mass = count - count.unsqueeze(1)
    scatter = square - square.unsqueeze(1) - (total - total.unsqueeze(1)).square() / mass.clamp(min=1)
    # cost[i, j] of one cluster of the points from i up to j
    cost = torch.where(mass > 0, scatter.clamp(min=0), torch.inf).fill_diagonal_(0.0)
    least, starts = cost[0], []
    for _ in range(num_centroids - 1):
        least, start = (least.unsqueeze(1) + cost).min(dim=0)
        starts.append(start)
    borders = [means.numel()]
    for start in reversed(starts):
        borders.append(int(start[borders[-1]]))
    labels = torch.bucketize(
        torch.arange(means.numel(), device=means.device), means.new_tensor(borders[:0:-1]), right=True
    )
    found = _means(means, counts, labels, otherwise=means[-1:].expand(num_centroids))
    return found.sort().values


def _means(
    points: torch.Tensor, counts: torch.Tensor, labels: torch.Tensor, *, otherwise: torch.Tensor
) -> torch.Tensor:
    """Mean of the points under each label; where there are none, `otherwise`."""
    mass = torch.bincount(labels, weights=counts, minlength=otherwise.numel())
    sums = torch.bincount(labels, weights=counts * points, minlength=otherwise.numel())
    return torch.where(mass > 0, sums / mass.clamp(min=1), otherwise)


def _sampled(rows: torch.Tensor) -> torch.Tensor:
    """At most `_MAX_VECTORS` of `[N, d]`, drawn: in equal steps they could all stand in the same columns."""
    if rows.shape[0] <= _MAX_VECTORS:
        return rows
    # A generator of its own: neither does it depend on the caller's random state, nor move it.
    places = torch.randint(rows.shape[0], (_MAX_VECTORS,), generator=torch.Generator().manual_seed(0))
    return rows[places.to(rows.device)]


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
    # Of a generator of its own, as in `_sampled`.
    draws = torch.rand(num_centroids, generator=torch.Generator().manual_seed(0)).to(rows)
    chosen = [rows[rows.shape[0] // 2]]
    distance = (rows - chosen[0]).square().sum(dim=1)
    for draw in draws[1:]:
        reached = distance.cumsum(0)
        place = torch.searchsorted(reached, draw * reached[-1]).clamp(max=rows.shape[0] - 1)
        chosen.append(rows[place])
        distance = torch.minimum(distance, (rows - rows[place]).square().sum(dim=1))
    return torch.stack(chosen)
