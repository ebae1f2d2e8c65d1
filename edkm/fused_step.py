"""One step by hand, on either road: over a table of a 16-bit weight's values, or over the weight itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from edkm.dkm import as_groups
from edkm.fused_passes import Rows, Slopes, assign, assign_backward
from edkm.fused_table import Table
from edkm.fused_walk import Rules, Walk, walk, walk_back

# On a core, for one weight, centroid and pass, of which there is one an iteration and one for the output.
_SECONDS_PER_WORK = 1e-8
# A step off the table road may take this long; with so many centroids that the table is what is meant, less.
_MAX_SECONDS, _MAX_SECONDS_OF_MANY = 120.0, 2.0
_MANY_CENTROIDS = 128
# A table takes float64 and counting by bits, which other devices lack.
_TABLE_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Arguments:
    """What is clustered, from which centroids and how softly: the arguments of `dkm` by those names.

    Arguments:
        table_dtype: float16 or bfloat16, through which a wider weight is cast where that makes a table; or
            None.
        table: of the weight, where `table_of` was asked already.
    """

    weight: torch.Tensor
    centroids: torch.Tensor
    temperature: float | torch.Tensor
    table_dtype: torch.dtype | None = None
    table: Table | None = None


@dataclass(frozen=True)
class Incoming:
    """Gradients to what `forward` returned, in its shapes; None is zero."""

    clustered: torch.Tensor | None
    moved: torch.Tensor | None


def forward(arguments: Arguments, *, rules: Rules) -> tuple[torch.Tensor, Walk, Table | None]:
    """Cluster.

    Returns:
        The clustered weight, the way of the centroids, and the table on whose road they went.

    Raises:
        ValueError: it would take too long.
    """
    weight = arguments.weight
    table = _table(arguments)
    if table is None:
        _check_work(arguments, rules)
    rows = _rows(arguments, table, wide=rules.wide)
    walked = walk(rows, as_groups(arguments.centroids).to(rows.dtype), rules=rules)
    # Not a view of what is filled here: autograd refuses in-place changes of a returned view.
    shape = weight.shape if table is None else rows.values.shape
    clustered = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    assign(rows, walked.path[-2], after=walked.path[-1], into=clustered.view(rows.values.shape))
    return clustered if table is None else table.look_up(weight, clustered.squeeze(2)), walked, table


def backward(
    arguments: Arguments, incoming: Incoming, *, walked: Walk, rules: Rules, needs_weight: bool
) -> tuple[torch.Tensor | None, Slopes]:
    """Gradients to the weight, if that is needed, and to centroids, `[G, K, d]`, and temperature.

    Arguments:
        arguments: as in `forward`.
        incoming: the gradients to begin with.
        walked: as `forward` returned it.
        rules: as in `forward`.
        needs_weight: whether to compute the first of them; the others cost next to nothing.
    """
    weight, table = arguments.weight, _table(arguments)
    rows = _rows(arguments, table, wide=rules.wide)
    into = torch.zeros(rows.values.shape, dtype=rows.dtype, device=weight.device) if needs_weight else None
    before, after = walked.path[-2:]
    to_after, slopes = torch.zeros_like(after), Slopes(torch.zeros_like(before), before.new_zeros(()))
    if incoming.clustered is not None:
        if table is None:
            gradient, direct = incoming.clustered.reshape(rows.values.shape), into
        else:
            gradient, direct = table.sums(weight, incoming.clustered).unsqueeze(2), None
        to_after, slopes = assign_backward(rows, gradient, before=before, after=after, into=direct)
    if incoming.moved is not None:
        to_after = to_after + incoming.moved.reshape(after.shape)
    slopes = walk_back(rows, walked, rules=rules, after=to_after, before=slopes, into=into)
    if into is None or table is None:
        return None if into is None else into.to(weight.dtype).view(weight.shape), slopes
    return _along(table, rows, arguments=arguments, incoming=incoming, walked=walked, heights=into), slopes


def _along(
    table: Table,
    rows: Rows,
    *,
    arguments: Arguments,
    incoming: Incoming,
    walked: Walk,
    heights: torch.Tensor,
) -> torch.Tensor:
    """The gradient to a weight by its table: `heights` flow back through the centroids to each, and past them
    its own incoming gradient times the slope of the assignment.
    """
    if incoming.clustered is None:
        return table.look_up(arguments.weight, heights.squeeze(2))
    slope, (before, after) = torch.zeros_like(heights), walked.path[-2:]
    assign_backward(rows, torch.ones_like(heights), before=before, after=after, into=slope)
    return table.look_up_line(
        arguments.weight, incoming.clustered, slope=slope.squeeze(2), height=heights.squeeze(2)
    )


def through(arguments: Arguments, weight: torch.Tensor) -> torch.Tensor:
    """The weight, or an alias of it, as the step sees it: rounded where it is read through a cast, which a
    gradient goes straight through.
    """
    table = _table(arguments)
    if table is None or table.dtype == weight.dtype:
        return weight
    rounded = weight.detach().to(table.dtype).to(weight.dtype)
    # What is added is zero and has the gradient.
    return rounded + (weight - weight.detach())


def table_of(weight: torch.Tensor, groups: torch.Tensor, *, table_dtype: torch.dtype | None) -> Table | None:
    """The table of a weight whose centroids are `groups`, `[G, K, d]`, where that saves work; the same
    whenever it is asked for.
    """
    dtype = weight.dtype if weight.element_size() == 2 else table_dtype
    if dtype is None or groups.shape[2] > 1 or weight.device.type not in _TABLE_DEVICES:
        return None
    return Table.of(weight, groups.shape[0], dtype=dtype)


def _table(arguments: Arguments) -> Table | None:
    if arguments.table is not None:
        return arguments.table
    groups = as_groups(arguments.centroids)
    return table_of(arguments.weight, groups, table_dtype=arguments.table_dtype)


def _rows(arguments: Arguments, table: Table | None, *, wide: torch.dtype) -> Rows:
    groups, temperature = as_groups(arguments.centroids), arguments.temperature
    needs_temperature = isinstance(temperature, torch.Tensor) and temperature.requires_grad
    # So few rows cost nothing in float64, and sums over counts are exact.
    dtype = wide if table is None else torch.float64
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.detach().reshape(()).to(device=groups.device, dtype=dtype)
    if table is None:
        values, counts = arguments.weight.reshape(groups.shape[0], -1, groups.shape[2]), None
    else:
        values, counts = table.values.reshape(1, -1, 1).expand(groups.shape[0], -1, 1), table.counts
    return Rows(values, counts, temperature, dtype, needs_temperature)


def _check_work(arguments: Arguments, rules: Rules) -> None:
    weight, num_centroids = arguments.weight, as_groups(arguments.centroids).shape[1]
    seconds = weight.numel() * num_centroids * (rules.iterations + 1) * _SECONDS_PER_WORK
    limit = _MAX_SECONDS_OF_MANY if num_centroids >= _MANY_CENTROIDS else _MAX_SECONDS
    if weight.device.type == "cpu" and seconds > limit:
        raise ValueError(
            f"fused_dkm of {weight.numel():,} weights in {weight.dtype}, {num_centroids} centroids and "
            f"{rules.iterations} iterations would take about {seconds:,.0f} s a step: give it in one group, "
            "not in vectors, and as float16 or bfloat16, or through DKMConfig(table_dtype='bfloat16'), which "
            "is many times faster; or give fewer bits"
        )
