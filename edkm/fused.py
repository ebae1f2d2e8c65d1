"""Differentiable k-means as one autograd function, whose backward is written by hand.

The same function as `edkm.dkm.dkm`, which stays for reading and as the reference. docs/paper.md has the
algebra.
"""

from __future__ import annotations

from typing import Any

import torch

from edkm.dkm import as_groups, check, dkm
from edkm.fused_step import Arguments, Incoming, backward, forward, through
from edkm.fused_table import Table
from edkm.fused_walk import Rules, Walk


def fused_dkm(
    weight: torch.Tensor,
    centroids: torch.Tensor,
    *,
    temperature: float | torch.Tensor,
    iterations: int,
    epsilon: float = 0.0,
    fixed_zero: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cluster a weight softly, as `dkm` does, in a fraction of its time and memory (eDKM, section on DKM).

    Saved for backward are the weight and the centroids of each iteration: nothing that grows with the weight.
    (Of a weight 256 times as large, or larger, the counts of its values, too, 512 KiB a group at most.)
    float16 and bfloat16 with d = 1 take the table road: a 16-bit weight has at most 65,536 values, and the
    iterations run in float64 on those that occur. All else, and groups so small that tables would save no
    work, goes piece by piece in the width that `dkm` computes in, and backward makes each piece's map anew.
    On a CPU both roads give the same bits from run to run at a fixed number of threads.

    A gradient that is itself to be differentiated (`create_graph`) is computed by `dkm`, in its memory. For
    forward-mode derivatives and the transforms of `torch.func`, which PyTorch refuses here, call `dkm`.

    Arguments:
        weight: float16, bfloat16, float32 or float64, any shape; taken as rows of d neighbouring weights.
        centroids: `[K]`, `[K, d]`, or `[G, K, d]` for G groups of output channels (equal parts of the first
            dimension).
        temperature: of the attention, in the square of the weight's unit; above 0; a tensor has one element.
        iterations: of k-means, 1 or more.
        epsilon: stop when no coordinate of a centroid moved by this much, in the weight's unit; 0 runs every
            iteration.
        fixed_zero: hold the first centroid of each group at zero, whatever its value.

    Returns:
        The clustered weight and the centroids, each with its gradient, as `dkm` does.

    Raises:
        TypeError: weight or centroids are not real floating point.
        ValueError: shapes that do not fit, a temperature or a number of iterations that is not above 0; off
            the table road on a CPU, a step that would take more than two minutes, or, from 128 centroids on,
            more than two seconds (3 iterations at 8 bits for 200,000 fp32 weights).
    """
    return fused_through(
        weight,
        centroids,
        temperature=temperature,
        iterations=iterations,
        epsilon=epsilon,
        fixed_zero=fixed_zero,
        table_dtype=None,
    )


def fused_through(
    weight: torch.Tensor,
    centroids: torch.Tensor,
    *,
    temperature: float | torch.Tensor,
    iterations: int,
    epsilon: float = 0.0,
    fixed_zero: bool = False,
    table_dtype: torch.dtype | None,
    table: Table | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`fused_dkm` of a wider weight as if it were cast to `table_dtype`, float16 or bfloat16.

    Only where that puts it on the table road; the gradient goes straight through the cast, and nothing else
    is rounded. `table` is what `table_of` says of the weight, if it was asked already.
    """
    groups = as_groups(centroids)
    check(weight, groups, temperature=temperature, iterations=iterations, epsilon=epsilon)
    if isinstance(temperature, torch.Tensor) and temperature.numel() != 1:
        raise ValueError(
            f"fused_dkm got a temperature of shape {list(temperature.shape)}: give one number, or use dkm"
        )
    wide = torch.promote_types(torch.promote_types(weight.dtype, centroids.dtype), torch.float32)
    rules = Rules(iterations=iterations, epsilon=epsilon, fixed_zero=fixed_zero, wide=wide)
    clustered, moved = _Fused.apply(  # type: ignore[no-untyped-call]
        weight, centroids, temperature, rules, table_dtype, table
    )
    return clustered, moved


class _Fused(torch.autograd.Function):
    """Saves its arguments and the way of the centroids."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        centroids: torch.Tensor,
        temperature: float | torch.Tensor,
        rules: Rules,
        table_dtype: torch.dtype | None,
        table: Table | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        arguments = Arguments(weight, centroids, temperature, table_dtype, table)
        clustered, walked, table = forward(arguments, rules=rules)
        is_tensor = isinstance(temperature, torch.Tensor)
        kept = temperature if is_tensor else None
        packed = None if table is None else table.packed(weight)
        ctx.save_for_backward(weight, centroids, kept, packed, walked.path, walked.masses)
        ctx.temperature, ctx.rules = None if is_tensor else temperature, rules
        ctx.table_dtype = table_dtype
        ctx.set_materialize_grads(False)
        moved = torch.empty(centroids.shape, dtype=rules.wide, device=centroids.device)
        moved.view(walked.path.shape[1:]).copy_(walked.path[-1])
        return clustered, moved

    @staticmethod
    def backward(
        ctx: Any, to_clustered: torch.Tensor | None, to_moved: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        if to_clustered is None and to_moved is None:
            return None, None, None, None, None, None
        weight, centroids, temperature, packed, *walked = ctx.saved_tensors
        temperature = ctx.temperature if temperature is None else temperature
        dtype = weight.dtype if weight.element_size() == 2 else ctx.table_dtype
        table = None if packed is None else Table.unpacked(packed, dtype)
        arguments = Arguments(weight, centroids, temperature, ctx.table_dtype, table)
        gradients = _by_dkm if torch.is_grad_enabled() else _by_hand
        return *gradients(ctx, arguments, Walk(*walked), Incoming(to_clustered, to_moved)), None, None, None


def _by_hand(
    ctx: Any, arguments: Arguments, walked: Walk, incoming: Incoming
) -> tuple[torch.Tensor | None, ...]:
    to_weight, slopes = backward(
        arguments, incoming, walked=walked, rules=ctx.rules, needs_weight=ctx.needs_input_grad[0]
    )
    centroids, temperature = arguments.centroids, arguments.temperature
    to_temperature = None
    if isinstance(temperature, torch.Tensor) and ctx.needs_input_grad[2]:
        to_temperature = slopes.temperature.reshape(temperature.shape).to(temperature)
    return to_weight, slopes.centroids.reshape(centroids.shape).to(centroids.dtype), to_temperature


def _by_dkm(
    ctx: Any, arguments: Arguments, walked: Walk, incoming: Incoming
) -> tuple[torch.Tensor | None, ...]:
    """Gradients with a graph of their own."""
    # Of aliases: through the arguments themselves a gradient could take ways that lie outside of the layer.
    weight, centroids = (
        arguments.weight.view_as(arguments.weight),
        arguments.centroids.view_as(arguments.centroids),
    )
    temperature = arguments.temperature
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.view_as(temperature)
    outputs = dkm(
        through(arguments, weight),
        centroids,
        temperature=temperature,
        iterations=walked.masses.shape[0],
        fixed_zero=ctx.rules.fixed_zero,
    )
    pairs = zip(outputs, (incoming.clustered, incoming.moved), strict=True)
    given = [(output, gradient) for output, gradient in pairs if gradient is not None]
    needed = ctx.needs_input_grad[:3]
    inputs = zip((weight, centroids, temperature), needed, strict=True)
    # `dkm` turns autocast off for itself, not for its gradients.
    with torch.autocast(weight.device.type, enabled=False):
        found = iter(
            torch.autograd.grad(
                [output for output, _ in given],
                [each for each, need in inputs if need and isinstance(each, torch.Tensor)],
                [gradient for _, gradient in given],
                create_graph=True,
                allow_unused=True,
            )
        )
    return tuple(next(found) if need else None for need in needed)
