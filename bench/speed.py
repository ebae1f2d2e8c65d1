"""The fused layer against the plain one and a rival: seconds, saved bytes, error of the gradient.

    python -m bench.speed --json

One weight at 3 bits: 4096 x 4096 bf16 at 1 and 3 iterations, 2048 x 2048 fp32 at 3; errors against float64 at
1024 x 1024; beside them the seconds of a copy of the weight, which is how fast it could be.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from bench.machine import keep, machine
from bench.rival import measure_palettizer
from bench.rounds import median_ratio, step_seconds
from bench.saved import saved_bytes
from edkm import dkm, fused_dkm

_SIZE = 4096
_SPREAD = 0.02
_TEMPERATURE = 4e-5  # a tenth of the variance
_NUM_CENTROIDS = 8
_ERROR_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Layer = Callable[..., tuple[Tensor, Tensor]]


class Problem:
    """A weight of `size` x `size`, its centroids and the gradient that comes to what is clustered."""

    def __init__(self, size: int, *, dtype: torch.dtype, iterations: int) -> None:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(size, size, generator=generator) * _SPREAD
        self.weight = nn.Parameter(weight.to(dtype))
        self.centroids = nn.Parameter(torch.linspace(-0.045, 0.045, _NUM_CENTROIDS))
        self.iterations = iterations
        self._incoming = torch.randn(size, size, generator=generator).to(dtype)

    def forward(self, layer: Layer) -> Tensor:
        """Return a loss that costs nothing and whose gradient is random."""
        clustered, _ = layer(
            self.weight, self.centroids, temperature=_TEMPERATURE, iterations=self.iterations
        )
        loss: Tensor = _Loss.apply(clustered, self._incoming)
        return loss

    def step(self, inside: AbstractContextManager[Layer]) -> Tensor:
        """Run forward, with the layer that the context gives, on cleared gradients."""
        self.weight.grad = self.centroids.grad = None
        with inside as layer:
            return self.forward(layer)

    def gradients(self, layer: Layer) -> dict[str, Tensor]:
        """Return both gradients in float64."""
        found = torch.autograd.grad(self.forward(layer), (self.weight, self.centroids))
        return {name: each.double() for name, each in zip(("weight", "centroids"), found, strict=True)}

    def in_float64(self) -> "Problem":
        """Return the same numbers, in float64."""
        wide = Problem(1, dtype=torch.float64, iterations=self.iterations)
        wide.weight = nn.Parameter(self.weight.detach().double())
        wide.centroids = nn.Parameter(self.centroids.detach().double())
        wide._incoming = self._incoming.double()
        return wide

    def plain_bytes(self) -> int:
        """Return about what the plain layer takes at its peak: eight fp32 maps an iteration, and six more."""
        return self.weight.numel() * _NUM_CENTROIDS * 4 * (2 * self.iterations + 6)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, clustered: Tensor, incoming: Tensor) -> Tensor:
        ctx.incoming = incoming
        return clustered.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004 - torch's signature
        return ctx.incoming, None


def measure(size: int, *, dtype: torch.dtype, iterations: int, num_rounds: int) -> dict[str, Any]:
    """Return seconds and bytes of both layers on one weight; of the plain one only where it fits."""
    problem = Problem(size, dtype=dtype, iterations=iterations)
    layers: dict[str, Layer] = {"fused": fused_dkm}
    room, needed = psutil.virtual_memory().available, problem.plain_bytes()
    row: dict[str, Any] = {"size": size, "dtype": str(dtype), "iterations": iterations}
    if needed < room:
        layers["plain"] = dkm
    else:
        row["plain"] = {"left_out": f"it takes {needed / 2**30:.1f} GiB, {room / 2**30:.1f} are free"}
    ways = {name: _giving(layer) for name, layer in layers.items()}
    seconds = step_seconds(problem.step, ways, num_rounds=num_rounds, num_warmup=1)
    for name, layer in layers.items():
        row[name] = {
            "saved_bytes": saved_bytes(lambda layer=layer: problem.forward(layer)),  # type: ignore[misc]
            "step_seconds": [round(each, 4) for each in seconds[name]],
        }
    copy_seconds = _copy_seconds(problem.weight.detach())
    row["copy_seconds"] = round(copy_seconds, 4)
    row["fused_over_copy"] = round(statistics.median(seconds["fused"]) / copy_seconds, 2)
    if "plain" in layers:
        row["plain_over_fused"] = round(median_ratio(seconds["plain"], seconds["fused"]), 2)
        row["saved_fused_over_plain"] = row["fused"]["saved_bytes"] / row["plain"]["saved_bytes"]
    return row


def gradient_errors(size: int, *, dtype: torch.dtype, iterations: int) -> dict[str, Any]:
    """Return the relative error of each gradient against the plain layer in float64."""
    problem = Problem(size, dtype=dtype, iterations=iterations)
    exact = problem.in_float64().gradients(dkm)
    row: dict[str, Any] = {"size": size, "dtype": str(dtype), "iterations": iterations}
    for name, layer in (("fused", fused_dkm), ("plain", dkm)):
        found = problem.gradients(layer)
        row[name] = {each: float((found[each] - exact[each]).norm() / exact[each].norm()) for each in exact}
    row["within_limit"] = all(row["fused"][each] <= 1.1 * row["plain"][each] + 1e-6 for each in exact)
    return row


def _giving(layer: Layer) -> Callable[[], AbstractContextManager[Layer]]:
    return lambda: nullcontext(layer)


def _copy_seconds(weight: Tensor) -> float:
    found = []
    for _ in range(9):
        start = time.perf_counter()
        weight.clone()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def main() -> None:
    """Measure, print, and keep the result when asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.speed", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument(
        "--size", type=int, default=_SIZE, help=f"rows and columns of the bf16 weight (default {_SIZE})"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="timed steps of each way; the median is told (default 3)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--keep", action="store_true", help="also write it to bench/results/")
    options = parser.parse_args()
    result = measure_all(options.size, num_rounds=options.rounds)
    if options.keep:
        keep("speed", result)
    print(json.dumps(result, indent=1) if options.json else _table(result))


def measure_all(size: int, *, num_rounds: int) -> dict[str, Any]:
    """Return every row: bf16 at `size` x `size`, fp32 at half of that, errors at a fourth."""
    half, fourth = size // 2, size // 4
    speed = [
        measure(size, dtype=torch.bfloat16, iterations=1, num_rounds=num_rounds),
        measure(size, dtype=torch.bfloat16, iterations=3, num_rounds=num_rounds),
        measure(half, dtype=torch.float32, iterations=3, num_rounds=num_rounds),
    ]
    rival = measure_palettizer(torch.randn(half, half) * _SPREAD, num_rounds=num_rounds)
    if "left_out" not in rival:
        fused = speed[-1]["fused"]
        rival["over_fused"] = round(median_ratio(rival["step_seconds"], fused["step_seconds"]), 2)
        rival["saved_over_fused"] = rival["saved_bytes"] / fused["saved_bytes"]
    errors = [
        gradient_errors(fourth, dtype=dtype, iterations=iterations)
        for dtype in _ERROR_DTYPES
        for iterations in (1, 3)
    ]
    return {"speed": speed, "DKMPalettizer": rival, "gradient_errors": errors, "machine": machine()}


def _table(result: dict[str, Any]) -> str:
    lines = [f"{'':34} {'s':>8} {'saved MiB':>11} {'plain/fused':>12} {'fused/copy':>11}"]
    for row in result["speed"]:
        what = f"{row['size']} {row['dtype'].removeprefix('torch.')}, {row['iterations']} iterations"
        lines += [f"{what + ', ' + name:34} {_figures(row[name])}" for name in ("fused", "plain")]
        lines[-2] += f" {row.get('plain_over_fused', ''):>12} {row['fused_over_copy']:>11}"
    lines.append(f"{'fp32, 3 iterations, DKMPalettizer':34} {_figures(result['DKMPalettizer'])}")
    lines.append("gradient's relative error against float64: weight, centroids")
    for row in result["gradient_errors"]:
        what = f"{row['size']} {row['dtype'].removeprefix('torch.')}, {row['iterations']} iterations"
        fused, plain = ("{weight:.1e} {centroids:.1e}".format(**row[name]) for name in ("fused", "plain"))
        lines.append(f"{what:34} fused {fused}, plain {plain}")
    return "\n".join(lines)


def _figures(row: dict[str, Any]) -> str:
    if "left_out" in row:
        return str(row["left_out"])
    return f"{statistics.median(row['step_seconds']):>8.3f} {row['saved_bytes'] / 2**20:>11.4f}"


if __name__ == "__main__":
    main()
