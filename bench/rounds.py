"""Measure several ways of doing a step side by side, in turn, so that a drifting machine drifts for all."""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from tqdm import tqdm

Inside = Callable[[], AbstractContextManager[Any]]
Step = Callable[[AbstractContextManager[Any]], Tensor]


def step_seconds(
    step: Step, ways: Mapping[str, Inside], *, num_rounds: int, num_warmup: int
) -> dict[str, list[float]]:
    """Run `step` under each of `ways` in turn and return the seconds of forward and backward, a figure a
    round.

    Arguments:
        step: runs forward inside the context it is given and returns the loss.
        ways: what to enter around forward, by name.
        num_rounds: figures to take of each way.
        num_warmup: rounds before the first that counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in tqdm(range(num_warmup + num_rounds), desc="rounds", unit="round", leave=False):
        # Each way takes its turn behind each other: what a step leaves in caches and heap is the next one's.
        turn = number % len(ways)
        for name in [*ways][turn:] + [*ways][:turn]:
            start = time.perf_counter()
            step(ways[name]()).backward()
            if number >= num_warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(seconds: list[float], baseline: list[float]) -> float:
    """Return the median over rounds of one way's time over another's in the same round."""
    return statistics.median(mine / theirs for mine, theirs in zip(seconds, baseline, strict=True))
