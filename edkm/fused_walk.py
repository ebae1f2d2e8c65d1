"""The way of the centroids through the iterations, and the way back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from edkm.fused_passes import Rows, Slopes, means_backward, moments


@dataclass(frozen=True)
class Walk:
    """Where the centroids were.

    Arguments:
        path: `[I + 1, G, K, d]`, before and after each of I iterations.
        masses: `[I, G, K, 1]`, the attention that each drew.
    """

    path: torch.Tensor
    masses: torch.Tensor


@dataclass(frozen=True)
class Rules:
    """How the centroids move; the arguments of `dkm` by those names.

    Arguments:
        wide: the dtype that `dkm` computes in, which decides when a cluster is empty.
    """

    iterations: int
    epsilon: float
    fixed_zero: bool
    wide: torch.dtype

    def occupied(self, mass: torch.Tensor) -> torch.Tensor:
        """Which centroids move to the mean of the rows; the others keep their place."""
        return mass > math.sqrt(torch.finfo(self.wide).tiny)

    def pin(self, centroids: torch.Tensor) -> torch.Tensor:
        """Zero for the first centroid of each group, or for the gradient to it, if it is held there."""
        if self.fixed_zero:
            centroids[:, 0] = 0
        return centroids


def walk(rows: Rows, start: torch.Tensor, *, rules: Rules) -> Walk:
    """Move the centroids, `[G, K, d]` in `rows.dtype`, for as many iterations as the rules say."""
    path, masses = [rules.pin(start.clone())], []
    for _ in range(rules.iterations):
        mass, sums = moments(rows, path[-1])
        occupied = rules.occupied(mass)
        moved = torch.where(occupied, sums / torch.where(occupied, mass, 1.0), path[-1])
        path.append(rules.pin(moved))
        masses.append(mass)
        if rules.epsilon and float((path[-1] - path[-2]).abs().max()) < rules.epsilon:
            break
    return Walk(torch.stack(path), torch.stack(masses))


def walk_back(
    rows: Rows, walked: Walk, *, rules: Rules, after: torch.Tensor, before: Slopes, into: torch.Tensor | None
) -> Slopes:
    """Backward of `walk`.

    Arguments:
        rows: that the centroids moved over.
        walked: the way there.
        rules: of it.
        after: the gradient to the last centroids, `[G, K, d]`.
        before: that to the centroids that the last iteration started from, past the iteration, and to the
            temperature.
        into: `[G, N, d]`, to which the gradient to one of each row is added; None spares it.

    Returns:
        The gradients to `start` and the temperature.
    """
    slopes = before
    for number in reversed(range(walked.masses.shape[0])):
        after = rules.pin(after.clone())
        occupied = rules.occupied(walked.masses[number])
        pull = torch.where(occupied, after / torch.where(occupied, walked.masses[number], 1.0), 0.0)
        steps = walked.path[number : number + 2]
        moved = means_backward(rows, pull, before=steps[0], after=steps[1], into=into)
        after = slopes.centroids + moved.centroids + torch.where(occupied, 0.0, after)
        slopes = Slopes(torch.zeros_like(after), slopes.temperature + moved.temperature)
    return Slopes(rules.pin(after), slopes.temperature)
