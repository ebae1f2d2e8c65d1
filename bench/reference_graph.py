"""The paper's graph: one bf16 weight, 3 bits, one k-means iteration, in the operations whose saves add up to
1600 MiB at 4096 x 4096: `cdist`, `square`, `softmax`, `clamp` and two matmuls.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class Graph:
    """The reference graph on fresh leaves; the weight is a parameter, so a store counts nothing for it."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        weight = (torch.randn(size, size, generator=generator) * 0.02).bfloat16()
        self.weight = nn.Parameter(weight)
        self.centroids = nn.Parameter(torch.linspace(-0.045, 0.045, 8).bfloat16())
        self._temperature = 4e-5
        self._target = torch.randn(size, size, generator=generator).bfloat16()

    def forward(self) -> Tensor:
        """Return a loss on the clustered weight and the new centroids."""
        rows = self.weight.reshape(-1, 1)
        distance = torch.cdist(rows, self.centroids.reshape(-1, 1)).square()
        attention = torch.softmax(-distance / self._temperature, dim=1).clamp(min=1e-8)
        centroids = (attention.t() @ rows) / attention.sum(0)[:, None]
        clustered = attention @ centroids
        return _inner(clustered.view_as(self.weight), self._target)

    def step(self, inside: AbstractContextManager[Any]) -> Tensor:
        """Run forward inside a context on cleared gradients."""
        self.weight.grad = self.centroids.grad = None
        with inside:
            return self.forward()

    def gradients(self, inside: AbstractContextManager[Any]) -> list[Tensor]:
        """Return both gradients, forward inside a context."""
        self.step(inside).backward()
        return [each.grad for each in (self.weight, self.centroids) if each.grad is not None]


class _Inner(torch.autograd.Function):
    """A loss that saves nothing that grows, so that the graph's saves are those of the paper's table."""

    @staticmethod
    def forward(ctx: Any, clustered: Tensor, target: Tensor) -> Tensor:
        ctx.target = target
        return (clustered.float() * target.float()).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad / ctx.target.numel()).to(ctx.target.dtype) * ctx.target, None


def _inner(clustered: Tensor, target: Tensor) -> Tensor:
    loss: Tensor = _Inner.apply(clustered, target)
    return loss


def asked_bytes(graph: Graph) -> tuple[int, int]:
    """Return the bytes that autograd asks to keep for one step, and how many of them are the parameters'."""
    asked, parameters = [0], [0]

    def pack(tensor: Tensor) -> Tensor:
        asked[0] += tensor.nbytes
        if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            parameters[0] += tensor.nbytes
        return tensor.detach()

    graph.step(saved_tensors_hooks(pack, lambda tensor: tensor))
    return asked[0], parameters[0]
