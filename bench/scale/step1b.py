"""A LLaMA of 1.1 billion weights, 3 bits and 8 for embedding and head: one step of fine-tuning at 1 x 128."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from bench.scale.child import run_child
from bench.scale.plain import ITERATIONS, plain_dkm
from bench.scale.room import require_memory
from bench.scale.shape import LLAMA_1B, Shape
from edkm import DKMConfig, cluster
from integrations.compensated import CompensatedAdamW

PEAK_LIMIT_BYTES = 16 << 30
"""Of the process that trains."""

_NUM_TOKENS = 128
_CONFIG = DKMConfig(bits=3, embedding_bits=8, iterations=ITERATIONS)
_LEARNING_RATE = 1e-3
# bfloat16 each: weight, gradient, two moments, what roundings lost, and the clustered weight.
_BYTES_PER_WEIGHT = 12


def measure(shape: Shape = LLAMA_1B, *, num_tokens: int = _NUM_TOKENS) -> dict[str, Any]:
    """Return peak and seconds of a process that makes the model, clusters it and takes two steps.

    The second step is the one that is told: it begins with the optimizer's state in memory, as all later ones
    do.

    Raises:
        SystemExit: it would not fit.
    """
    require_memory(_BYTES_PER_WEIGHT * shape.num_weights, what="step1b")
    named = {"shape": asdict(shape), "num_tokens": num_tokens}
    num_clustered = shape.num_layers * shape.num_clustered
    result = named | {"num_weights": shape.num_weights, "num_clustered": num_clustered}
    result |= run_child("bench.scale.step1b:finetune", **named)
    result["plain_dkm"] = plain_dkm(num_clustered, bits=_CONFIG.bits, iterations=_CONFIG.iterations)
    return result | {"within_limits": result["peak_bytes"] <= PEAK_LIMIT_BYTES}


def table(result: dict[str, Any]) -> str:
    """Return the result for reading."""
    lines = [f"{what:10} {seconds:>8.1f} s" for what, seconds in result["seconds"].items()]
    lines.append(f"{'step':10} {result['step_seconds']:>8.1f} s")
    lines.append(
        f"peak {result['peak_bytes'] / 2**30:.2f} GiB, limit {PEAK_LIMIT_BYTES / 2**30:.0f}; "
        f"losses {', '.join(f'{loss:.4f}' for loss in result['losses'])}"
    )
    plain = result["plain_dkm"]
    lines.append(f"plain DKM would keep {plain['kept_bytes'] / 2**30:.0f} GiB: {plain['how']}")
    return "\n".join(lines)


def finetune(shape: dict[str, int], num_tokens: int) -> dict[str, Any]:
    """Make, cluster and train a model, in a child; seconds of each part, of a step those of the last."""
    clock = _Clock()
    torch.manual_seed(0)
    with clock.part("make"):
        model = Shape(**shape).model()
    with clock.part("cluster"):
        clustering = cluster(model, _CONFIG)
        optimizer = CompensatedAdamW(clustering.parameter_groups(_LEARNING_RATE))
    tokens = torch.randint(shape["vocabulary"], (1, num_tokens))
    losses = []
    for _ in range(2):
        with clock.part("forward"):
            loss = model(input_ids=tokens, labels=tokens).loss
            losses.append(float(loss.detach()))
        with clock.part("backward"):
            loss.backward()
        with clock.part("update"):
            clustering.clip_grad_norm_(1.0)
            optimizer.step(1.0)
            clustering.step()
    step = sum(clock.seconds[part] for part in ("forward", "backward", "update"))
    return {"seconds": clock.seconds, "step_seconds": round(step, 2), "losses": losses}


class _Clock:
    """The seconds of each part, the last time it ran, on a progress bar."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._bar = tqdm(total=8, unit="part", leave=False)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._bar.set_description(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)
        self._bar.update()
