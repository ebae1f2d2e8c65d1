"""The paper's ablation on the reference graph: bytes that each stage of the store leaves, and what it costs
in time.

    python -m bench.ablation --size 4096 --json

One bf16 weight, 3 bits, one k-means iteration, in the operations whose saves add up to the paper's 1600 MiB
at 4096 x 4096: `cdist`, `square`, `softmax`, `clamp` and two matmuls.
"""

import argparse
import json
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from bench.machine import keep, machine
from bench.rounds import median_ratio, step_seconds
from offload import SavedTensorStore

_MIB = 2**20
_PAPER = {
    "none": {"held_mib": 1600.0, "time_over_plain": 1.0},
    "dedupe": {"held_mib": 544.0, "time_over_plain": 1.04},
    "dedupe+uniquify": {"held_mib": 97.0, "time_over_plain": 1.84},
}
"""Of the paper's table at 4096 x 4096, one learner's worth, the weight counted; eDKM, arXiv 2309.00964."""

_WAYS = {
    "none": {"dedupe": False, "uniquify": False},
    "dedupe": {"dedupe": True, "uniquify": False},
    "dedupe+uniquify": {"dedupe": True, "uniquify": True},
}


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


def measure(size: int, *, num_rounds: int) -> dict[str, Any]:
    """Return the table for a weight of `size` x `size`."""
    graph = Graph(size)
    asked, parameters = asked_bytes(graph)
    plain = [gradient.clone() for gradient in graph.gradients(nullcontext())]
    rows = {name: _bytes_of(graph, plain, **options) for name, options in _WAYS.items()}
    ways = {"plain": nullcontext} | {name: _entering(**options) for name, options in _WAYS.items()}
    seconds = step_seconds(graph.step, ways, num_rounds=num_rounds, num_warmup=1)
    for name, row in rows.items():
        row["time_over_plain"] = round(median_ratio(seconds[name], seconds["plain"]), 3)
        row["step_seconds"] = [round(each, 3) for each in seconds[name]]
    return {
        "size": size,
        "asked_mib": asked / _MIB,
        "asked_for_parameters_mib": parameters / _MIB,
        "plain_step_seconds": [round(each, 3) for each in seconds["plain"]],
        "rows": rows,
        "paper": _PAPER,
        "machine": machine(),
    }


def _entering(*, dedupe: bool, uniquify: bool) -> Any:
    return lambda: SavedTensorStore(dedupe=dedupe, uniquify=uniquify)


def _bytes_of(graph: Graph, plain: list[Tensor], *, dedupe: bool, uniquify: bool) -> dict[str, Any]:
    store = SavedTensorStore(dedupe=dedupe, uniquify=uniquify)
    loss = graph.step(store)
    held = store.stats
    loss.backward()
    gradients = [graph.weight.grad, graph.centroids.grad]
    identical = all(
        mine is not None and torch.equal(mine.view(torch.int16), theirs.view(torch.int16))
        for mine, theirs in zip(gradients, plain, strict=True)
    )
    return {
        "saved_mib": held.saved_bytes / _MIB,
        "storage_mib": held.storage_bytes / _MIB,
        "held_mib": round(held.held_bytes / _MIB, 4),
        "peak_held_mib": round(held.peak_held_bytes / _MIB, 4),
        "held_after_backward_bytes": store.stats.held_bytes,
        "num_by_stage": dict(held.num_by_stage),
        "bit_identical": identical,
    }


def main() -> None:
    """Measure, print, and keep the result when asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.ablation", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--size", type=int, default=1024, help="rows and columns of the weight (default 1024)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="timed steps of each row; the median is told (default 3)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--keep", action="store_true", help="also write it to bench/results/")
    options = parser.parse_args()
    result = measure(options.size, num_rounds=options.rounds)
    if options.keep:
        keep("ablation", result)
    print(json.dumps(result, indent=1) if options.json else _table(result))


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"asked {result['asked_mib']:.1f} MiB, {result['asked_for_parameters_mib']:.1f} of them parameters",
        f"{'':16} {'held MiB':>10} {'peak MiB':>10} {'time':>6}  gradients",
    ]
    for name, row in result["rows"].items():
        same = "equal" if row["bit_identical"] else "DIFFER"
        sizes = f"{row['held_mib']:>10.2f} {row['peak_held_mib']:>10.2f}"
        lines.append(f"{name:16} {sizes} {row['time_over_plain']:>5.2f}x  {same}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
