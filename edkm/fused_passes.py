"""Passes over the rows of a weight, a piece at a time: k-means forward, and backward by hand.

A pass makes the map of attention anew for each piece, laid out centroid by centroid, and leaves only sums:
its memory is that of a piece. docs/paper.md has the algebra.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Entries of a piece's map: on a CPU a few such maps fit into a core's cache, elsewhere they fill the device.
_CPU_PIECE_ENTRIES = 1 << 18
_PIECE_ENTRIES = 1 << 24
# Of the smallest normal number's logarithm: products of an attention above it are normal, too.
_NORMAL_SHARE = 0.7

_Place = tuple[slice, slice]  # which groups, and which of their rows


@dataclass(frozen=True)
class Rows:
    """Rows to cluster, and how softly.

    Arguments:
        values: `[G, N, d]`, floating point; not copied.
        counts: `[G, N]` in `dtype`, how often each row stands in the weight; None is once.
        temperature: above 0; a tensor is 0-d and in `dtype`.
        dtype: to compute in.
        needs_temperature: whether its gradient is wanted.
    """

    values: torch.Tensor
    counts: torch.Tensor | None
    temperature: float | torch.Tensor
    dtype: torch.dtype
    needs_temperature: bool


@dataclass(frozen=True)
class Slopes:
    """Gradients to the centroids `[G, K, d]` that a pass started from, and to the temperature, 0-d."""

    centroids: torch.Tensor
    temperature: torch.Tensor


def moments(rows: Rows, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mass and weighted sum of the rows under each centroid's attention, `[G, K, 1]` and `[G, K, d]`."""

    def terms(place: _Place) -> list[torch.Tensor]:
        piece = _piece(rows, place)
        attention = _counted(_attention(rows, piece, centroids[place[0]]), rows.counts, place)
        sums = [(attention * row.unsqueeze(1)).sum(dim=2) for row in piece.unbind(1)]
        return [attention.sum(dim=2, keepdim=True), torch.stack(sums, dim=2)]

    mass, sums = _summed(rows, centroids.shape[1], terms=terms)
    return mass, sums


def assign(rows: Rows, before: torch.Tensor, *, after: torch.Tensor, into: torch.Tensor) -> None:
    """Write A C, with A the attention to the centroids `before` and C those `after`, `[G, K, d]` both, into
    `[G, N, d]` of any floating point.
    """
    for places in _places(rows, before.shape[1]):
        for place in places:
            attention = _attention(rows, _piece(rows, place), before[place[0]])
            targets = after[place[0]].unbind(2)
            for coordinate, target in zip(into[place].unbind(2), targets, strict=True):
                coordinate.copy_((attention * target.unsqueeze(2)).sum(dim=1))


def assign_backward(
    rows: Rows,
    gradient: torch.Tensor,
    *,
    before: torch.Tensor,
    after: torch.Tensor,
    into: torch.Tensor | None,
) -> tuple[torch.Tensor, Slopes]:
    """Backward of `assign`.

    Arguments:
        rows: as in `assign`.
        gradient: to A C, `[G, N, d]`; for a row that stands in the weight several times, their sum.
        before: as in `assign`.
        after: as in `assign`.
        into: `[G, N, d]` in `rows.dtype`, to which the gradient to each row is added; None spares it.

    Returns:
        The gradient to `after`, `[G, K, d]`, and the slopes.
    """

    def terms(place: _Place) -> list[torch.Tensor]:
        piece, starts, targets = _piece(rows, place), before[place[0]], after[place[0]]
        incoming = gradient[place].to(rows.dtype).unbind(2)
        attention = _attention(rows, piece, starts)
        pulls = [(attention * row.unsqueeze(1)).sum(dim=2) for row in incoming]
        slope = _dot(
            row.unsqueeze(1) * target.unsqueeze(2)
            for row, target in zip(incoming, targets.unbind(2), strict=True)
        )
        share = _softmax_backward(slope, attention)
        to_rows = None if into is None else into[place]
        slopes = _distance_backward(rows, piece, centroids=starts, share=share, into=to_rows)
        return [torch.stack(pulls, dim=2), *slopes]

    to_after, *slopes = _summed(rows, before.shape[1], terms=terms)
    return to_after, _scaled(rows, slopes)


def means_backward(
    rows: Rows, pull: torch.Tensor, *, before: torch.Tensor, after: torch.Tensor, into: torch.Tensor | None
) -> Slopes:
    """Backward of moving the centroids `before` to the means `after`.

    Arguments:
        rows: that the means are of.
        pull: the gradient to each mean over its mass, `[G, K, d]`; 0 where there is no mean.
        before: `[G, K, d]`.
        after: `[G, K, d]`.
        into: `[G, N, d]` in `rows.dtype`, to which the gradient to one of each row is added; None spares it.
    """

    def terms(place: _Place) -> list[torch.Tensor]:
        piece, starts, weights = _piece(rows, place), before[place[0]], pull[place[0]].unbind(2)
        attention = _attention(rows, piece, starts)
        slope = _dot(
            (row.unsqueeze(1) - mean.unsqueeze(2)).mul_(weight.unsqueeze(2))
            for row, mean, weight in zip(piece.unbind(1), after[place[0]].unbind(2), weights, strict=True)
        )
        to_rows = None if into is None else into[place]
        if to_rows is not None:
            for row, weight in zip(to_rows.unbind(2), weights, strict=True):
                row.add_((attention * weight.unsqueeze(2)).sum(dim=1))
        share = _softmax_backward(slope, attention)
        counts = None if rows.counts is None else rows.counts[place]
        return _distance_backward(rows, piece, centroids=starts, share=share, into=to_rows, counts=counts)

    return _scaled(rows, _summed(rows, before.shape[1], terms=terms))


def _places(rows: Rows, num_centroids: int) -> Iterator[list[_Place]]:
    """The pieces of a pass: for each few groups, those of their rows, one at least."""
    num_groups, num_rows, _ = rows.values.shape
    num_entries = _CPU_PIECE_ENTRIES if rows.values.device.type == "cpu" else _PIECE_ENTRIES
    groups_at_once = max(1, num_entries // max(1, num_rows * num_centroids))
    rows_at_once = max(1, num_entries // num_centroids)
    for group in range(0, num_groups, groups_at_once):
        groups = slice(group, group + groups_at_once)
        yield [(groups, slice(row, row + rows_at_once)) for row in range(0, max(1, num_rows), rows_at_once)]


def _summed(
    rows: Rows, num_centroids: int, *, terms: Callable[[_Place], list[torch.Tensor]]
) -> list[torch.Tensor]:
    """Sum each of a pass's terms over the pieces of a group; groups follow one another."""
    blocks = []
    for places in _places(rows, num_centroids):
        # Stacked, they are added in pairs.
        pieces = zip(*[terms(place) for place in places], strict=True)
        blocks.append([torch.stack(each).sum(dim=0) if len(each) > 1 else each[0] for each in pieces])
    return [torch.cat(each) if len(each) > 1 else each[0] for each in zip(*blocks, strict=True)]


def _piece(rows: Rows, place: _Place) -> torch.Tensor:
    """Coordinate by coordinate: `[G, d, N]`."""
    return rows.values[place].transpose(1, 2).to(rows.dtype).contiguous()


def _attention(rows: Rows, piece: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Softmax over the centroids, `[G, K, N]`, of which what could not be told from zero is zero.

    Most of a cold map is subnormal otherwise, and each pass over it takes more than twice as long. What a
    centroid would lose with it is far below the mass from which it is occupied.
    """
    distance = _dot(
        (row.unsqueeze(1) - centroid.unsqueeze(2)).square_()
        for row, centroid in zip(piece.unbind(1), centroids.unbind(2), strict=True)
    )
    exponent = distance.sub_(distance.amin(dim=1, keepdim=True)).div_(-rows.temperature)
    least = _NORMAL_SHARE * math.log(torch.finfo(exponent.dtype).tiny)
    return torch.softmax(F.threshold(exponent, least, -math.inf, inplace=True), dim=1)


def _dot(products: Iterator[torch.Tensor]) -> torch.Tensor:
    total = next(products)
    for product in products:
        total.add_(product)
    return total


def _counted(terms: torch.Tensor, counts: torch.Tensor | None, place: _Place) -> torch.Tensor:
    return terms if counts is None else terms.mul_(counts[place].unsqueeze(1))


def _softmax_backward(slope: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """Gradient to the softmax's argument from that to the attention, `slope`, which it overwrites."""
    return slope.sub_((slope * attention).sum(dim=1, keepdim=True)).mul_(attention)


def _distance_backward(
    rows: Rows,
    piece: torch.Tensor,
    *,
    centroids: torch.Tensor,
    share: torch.Tensor,
    into: torch.Tensor | None,
    counts: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """From the gradient to minus distance over temperature, `share` `[G, K, N]`: add that to the rows, and
    return the terms of those to centroids and temperature, which `_scaled` finishes.
    """
    to_centroids, to_temperature = [], torch.zeros_like(centroids[:, :1, 0])
    for number, (row, centroid) in enumerate(zip(piece.unbind(1), centroids.unbind(2), strict=True)):
        difference = row.unsqueeze(1) - centroid.unsqueeze(2)
        product = share * difference
        if into is not None:
            into[..., number].sub_(product.sum(dim=1).mul_(2).div_(rows.temperature))
        if counts is not None:
            product.mul_(counts.unsqueeze(1))
        to_centroids.append(product.sum(dim=2))
        if rows.needs_temperature:
            to_temperature = to_temperature + product.mul_(difference).sum(dim=(1, 2)).unsqueeze(1)
    return [torch.stack(to_centroids, dim=2), to_temperature]


def _scaled(rows: Rows, slopes: list[torch.Tensor]) -> Slopes:
    """Divide by the temperature what all pieces have in common."""
    to_centroids, to_temperature = slopes
    # Divided twice: the square of a small temperature could underflow.
    to_temperature = to_temperature.sum() / rows.temperature / rows.temperature
    return Slopes(to_centroids * 2 / rows.temperature, to_temperature)
