"""The states of the process's random number generators, as JSON takes them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch


def random_state() -> dict[str, Any]:
    """What torch, on the CPU and on the GPU that this process uses, Python and numpy draw from."""
    name, keys, *rest = numpy.random.get_state(legacy=True)
    has_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {
        "torch": _hex(torch.get_rng_state()),
        "cuda": _hex(torch.cuda.get_rng_state()) if has_cuda else None,
        "python": random.getstate(),
        "numpy": [name, numpy.asarray(keys).tolist(), *rest],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Draw on where `state` was taken."""
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(_bytes(state["cuda"]))
    version, numbers, next_gauss = state["python"]
    random.setstate((version, tuple(numbers), next_gauss))
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))


def _hex(state: torch.Tensor) -> str:
    return bytes(state.tolist()).hex()


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
