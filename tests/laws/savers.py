"""Operations that save one tensor: an input or an output, whole or as a view.

Each gradient tells the bytes that backward read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.laws.graphs import Product


@dataclass(frozen=True)
class Saved:
    """An output to differentiate, the leaf to differentiate by, and the tensor that a write is aimed at."""

    output: Tensor
    leaf: Tensor
    target: Tensor


def ones(like: Tensor) -> Tensor:
    return torch.ones_like(like, requires_grad=True)


def handed(x: Tensor, *, alone: bool) -> Tensor:
    """Return what the operation gets: the target itself, or when the write must not reach it, a copy."""
    return x.clone() if alone else x


def product(values: Tensor, *, alone: bool) -> Saved:
    target = values.clone()
    factor = handed(target, alone=alone)
    weight = ones(factor)
    return Saved(weight * factor, weight, target)


def matrix(values: Tensor, *, alone: bool) -> Saved:
    target = values.clone()
    weight = ones(values[:2])
    return Saved(weight @ handed(target, alone=alone).t(), weight, target)


def view_of_base(values: Tensor, *, alone: bool) -> Saved:
    base = values.clone()
    part = handed(base, alone=alone)[1:, ::2]
    weight = ones(part)
    return Saved(weight * part, weight, base)


def base_through_view(values: Tensor, *, alone: bool) -> Saved:
    base = values.clone()
    factor = handed(base, alone=alone)
    weight = ones(factor)
    return Saved(weight * factor, weight, base[2:])


def expanded(values: Tensor, *, alone: bool) -> Saved:
    target = values.clone()
    wide = handed(target, alone=alone).expand(2, *target.shape)
    weight = ones(wide)
    return Saved(weight * wide, weight, target)


def leaf_input(values: Tensor, *, alone: bool) -> Saved:
    leaf = values.clone().requires_grad_()
    target = leaf.detach().clone() if alone else leaf
    return Saved(leaf.sin(), leaf, target)


def inner_input(values: Tensor, *, alone: bool) -> Saved:
    weight = ones(values)
    hidden = weight * values.clone()
    return Saved(hidden.square(), weight, hidden.detach().clone() if alone else hidden)


def result(function: Callable[[Tensor], Tensor]) -> Callable[..., Saved]:
    def saver(values: Tensor, *, alone: bool) -> Saved:
        leaf = values.clone().requires_grad_()
        output = function(leaf)
        return Saved(output, leaf, output.detach().clone() if alone else output)

    return saver


def own_function(values: Tensor, *, alone: bool) -> Saved:
    target = values.clone()
    factor = handed(target, alone=alone)
    weight = ones(factor)
    return Saved(Product.apply(weight, factor), weight, target)


class KeyAndMap(torch.autograd.Function):
    """Saves a tensor and what was computed from it, element by element; backward reads both."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, weight: Tensor, key: Tensor, mapped: Tensor
    ) -> Tensor:
        ctx.save_for_backward(key, mapped)
        return weight * mapped

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        _, mapped = ctx.saved_tensors
        return gradient * mapped, None, None


def map_of(key: Tensor, *, alone: bool) -> Saved:
    mapped = key.detach().float().exp()
    weight = ones(mapped)
    return Saved(KeyAndMap.apply(weight, handed(key, alone=alone), mapped), weight, key)


def map_of_tensor(values: Tensor, *, alone: bool) -> Saved:
    return map_of(values.half(), alone=alone)


def map_of_parameter(values: Tensor, *, alone: bool) -> Saved:
    return map_of(nn.Parameter(values.half()), alone=alone)


SAVERS: Mapping[str, Callable[..., Saved]] = {
    "product": product,
    "matrix": matrix,
    "view of base": view_of_base,
    "base through view": base_through_view,
    "expanded": expanded,
    "leaf": leaf_input,
    "inner": inner_input,
    "exp": result(torch.exp),
    "softmax": result(lambda x: x.softmax(-1)),
    "relu": result(torch.relu),
    "own function": own_function,
    "map of a tensor": map_of_tensor,
    "map of a parameter": map_of_parameter,
}
