"""What a user would pick instead: Core ML Tools' `DKMPalettizer`, if that is installed."""

import importlib.util
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bench.rounds import step_seconds
from bench.saved import saved_bytes
from edkm import Clustering

MISSING = "coremltools is not installed: pip install coremltools==9.0"


def measure_palettizer(weight: Tensor, *, num_rounds: int) -> dict[str, Any]:
    """Return bytes and seconds of a step over one fp32 weight, `[out, in]`, at 3 bits and 3 iterations; or
    why there are none.

    Its first forward finds starting centroids, for minutes at 2048 x 2048, and is told by itself.
    """
    if importlib.util.find_spec("coremltools") is None:
        return {"left_out": MISSING}
    linear = _palettized(weight)
    row = torch.ones(1, weight.shape[1])
    start = time.perf_counter()
    linear(row)
    init_seconds = time.perf_counter() - start

    def step(inside: Any) -> Tensor:
        linear.zero_grad(set_to_none=True)
        with inside:
            loss: Tensor = linear(row).sum()
        return loss

    seconds = step_seconds(step, {"palettizer": nullcontext}, num_rounds=num_rounds, num_warmup=0)
    return {
        "saved_bytes": saved_bytes(lambda: step(nullcontext())),
        "step_seconds": [round(each, 3) for each in seconds["palettizer"]],
        "init_seconds": round(init_seconds, 1),
    }


def _palettized(weight: Tensor) -> nn.Module:
    from coremltools.optimize.torch.palettization import DKMPalettizer, DKMPalettizerConfig

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight)
    options = {"n_bits": 3, "kmeans_max_iter": 3, "milestone": 0, "weight_threshold": 0}
    palettizer = DKMPalettizer(
        nn.Sequential(linear), DKMPalettizerConfig.from_dict({"global_config": options})
    )
    prepared: nn.Module = palettizer.prepare(inplace=True)
    palettizer.step()
    return prepared.train()


class PalettizerWeights(Clustering):
    """A model under `DKMPalettizer`, trained at the rates that eDKM has.

    Arguments:
        model: dense; changed in place.
        names: of the linears to palettize.
        bits: of an index.
    """

    def __init__(self, model: nn.Module, *, names: Sequence[str], bits: int) -> None:
        from coremltools.optimize.torch.palettization import DKMPalettizer, DKMPalettizerConfig

        options = {"n_bits": bits, "milestone": 0, "weight_threshold": 0}
        config = DKMPalettizerConfig.from_dict({"module_name_configs": dict.fromkeys(names, options)})
        self._palettizer = DKMPalettizer(model, config)
        self.model: nn.Module = self._palettizer.prepare(inplace=True)
        self._palettizer.step()
        super().__init__(self.model, {})

    def step(self) -> None:
        """Tell the palettizer's schedule that a step is done."""
        self._palettizer.step()

    def finalized(self) -> nn.Module:
        """Return the model with its snapped weights, dense."""
        finished: nn.Module = self._palettizer.finalize(inplace=True)
        return finished.eval()
