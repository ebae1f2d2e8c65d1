"""One LLaMA-7B decoder layer, all seven linears at 3 bits: forward and backward at 1 x 512."""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from bench.rounds import step_seconds
from bench.saved import storage_bytes
from bench.scale.child import run_child
from bench.scale.plain import ITERATIONS, plain_dkm
from bench.scale.room import require_memory
from bench.scale.shape import LLAMA_7B, Shape
from edkm import DKMConfig, cluster

PEAK_LIMIT_BYTES = 4 << 30
"""Of the process that clusters."""

_NUM_TOKENS = 512
_BITS = 3
_LIMIT_DENSE, _LIMIT_COPIES = 2, 10


def measure(shape: Shape = LLAMA_7B, *, num_tokens: int = _NUM_TOKENS, num_rounds: int = 9) -> dict[str, Any]:
    """Return peaks, each of a process that does nothing else, and seconds, taken in turn in a third one.

    Raises:
        SystemExit: it would not fit.
    """
    # Two layers and their gradients, the clustered weights, and a buffer to copy to.
    require_memory(2 * shape.num_clustered * 7, what="layer7b")
    named = {"shape": asdict(shape), "num_tokens": num_tokens}
    result: dict[str, Any] = named | {"num_clustered": shape.num_clustered, "bits": _BITS}
    for way in ("dense", "edkm"):
        result[way] = run_child("bench.scale.layer7b:steps", way=way, **named)
    timed = run_child("bench.scale.layer7b:seconds", num_rounds=num_rounds, **named)
    for way in ("dense", "edkm"):
        result[way]["step_seconds"] = timed[way]
    result["copy_seconds"] = timed["copy"]
    dense, ours = (statistics.median(timed[way]) for way in ("dense", "edkm"))
    limit = _LIMIT_DENSE * dense + _LIMIT_COPIES * timed["copy"]
    result["plain_dkm"] = plain_dkm(shape.num_clustered, bits=_BITS, iterations=ITERATIONS)
    return result | {
        "limit_seconds": round(limit, 3),
        "within_limits": ours <= limit and result["edkm"]["peak_bytes"] <= PEAK_LIMIT_BYTES,
    }


def table(result: dict[str, Any]) -> str:
    """Return the result for reading."""
    lines = [f"{'':26} {'peak GiB':>9} {'held GiB':>9} {'s':>8}"]
    for way, name in (("dense", "dense"), ("edkm", f"edkm, {result['bits']} bits")):
        row = result[way]
        figures = [row["peak_bytes"] / 2**30, row["held_bytes"] / 2**30]
        seconds = statistics.median(row["step_seconds"])
        lines.append(f"{name:26} {figures[0]:>9.2f} {figures[1]:>9.2f} {seconds:>8.2f}")
    lines.append(f"{'limit':26} {PEAK_LIMIT_BYTES / 2**30:>9.2f} {'':>9} {result['limit_seconds']:>8.2f}")
    plain = result["plain_dkm"]
    lines.append(f"{'plain DKM':26} {'':>9} {plain['kept_bytes'] / 2**30:>9.2f}  {plain['how']}")
    return "\n".join(lines)


class LayerStep:
    """A decoder layer and what comes in; each step starts on cleared gradients."""

    def __init__(self, shape: Shape, *, num_tokens: int, clustered: bool) -> None:
        torch.manual_seed(0)
        self.layer: nn.Module = shape.layer()
        self._hidden = torch.randn(1, num_tokens, shape.width).bfloat16()
        rotary = LlamaRotaryEmbedding(shape.config())
        self._position = rotary(self._hidden, torch.arange(num_tokens)[None])
        if clustered:
            cluster(self.layer, DKMConfig(bits=_BITS, iterations=ITERATIONS))

    def forward(self) -> Tensor:
        """Run forward, on a hidden state that wants a gradient as in the middle of a model."""
        self.layer.zero_grad(set_to_none=True)
        hidden = self._hidden.detach().requires_grad_()
        output: Tensor = self.layer(hidden, position_embeddings=self._position)
        return output.float().square().mean()


def steps(way: str, shape: dict[str, int], num_tokens: int) -> dict[str, Any]:
    """Run two steps, in a child, and return what is held for backward, weights left out."""
    step = LayerStep(Shape(**shape), num_tokens=num_tokens, clustered=way == "edkm")
    for _ in range(2):
        step.forward().backward()
    step.layer.zero_grad(set_to_none=True)
    return {"held_bytes": storage_bytes(step.forward)}


def seconds(shape: dict[str, int], num_tokens: int, num_rounds: int) -> dict[str, Any]:
    """Return the seconds of each step, dense and clustered in turn, and of a copy of the weights."""
    ways = {
        name: LayerStep(Shape(**shape), num_tokens=num_tokens, clustered=name == "edkm")
        for name in ("dense", "edkm")
    }

    def run(inside: AbstractContextManager[LayerStep]) -> Tensor:
        with inside as step:
            return step.forward()

    entered: dict[str, Callable[[], AbstractContextManager[LayerStep]]] = {
        name: lambda step=step: nullcontext(step)  # type: ignore[misc]
        for name, step in ways.items()
    }
    found = step_seconds(run, entered, num_rounds=num_rounds, num_warmup=2)
    rounded = {name: [round(each, 3) for each in times] for name, times in found.items()}
    return rounded | {"copy": round(_copy_seconds(ways["dense"].layer), 4)}


def _copy_seconds(layer: nn.Module) -> float:
    """Copy all weights to memory that is there already, which is the fastest that a copy can be."""
    weights = [parameter.detach() for parameter in layer.parameters() if parameter.dim() > 1]
    targets = [weight.clone() for weight in weights]
    found = []
    for _ in range(9):
        start = time.perf_counter()
        for target, weight in zip(targets, weights, strict=True):
            target.copy_(weight)
        found.append(time.perf_counter() - start)
    return statistics.median(found)
