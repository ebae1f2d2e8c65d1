"""What to cluster, to how many bits, and how softly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

_TABLE_DTYPES = (None, "float16", "bfloat16")


@dataclass(frozen=True)
class DKMConfig:
    """How a model's weights are clustered; checked once, when made.

    Arguments:
        bits: per weight (per vector of weights) of every linear but the output head, 1 to 8.
        embedding_bits: the same for embeddings and the output head, which train dense and are snapped in
            evaluation and by `palettize`; None leaves them dense.
        overrides: bits, or None for dense, by a pattern (`fnmatch`) on the module's name; the first that
            matches counts.
        vector_length: how many neighbouring weights of a row are clustered together.
        num_groups: equal parts of a linear's output channels, with a palette each; the largest number that
            divides both this and the channels. What trains dense has one palette.
        iterations: of k-means in each forward pass; centroids are carried from step to step.
        epsilon: stop iterating when no centroid moved further than this, in units of the weight's standard
            deviation; 0 runs every iteration.
        temperature: of the attention at the first step, in units of the weight's variance.
        final_temperature: the same at the last step; it falls geometrically.
        num_steps: optimizer steps over which it falls.
        table_dtype: "bfloat16" or "float16" to cluster wider weights, in training, as if they were cast to
            it, which lets a step run on a table of their values; None clusters them as they are.

    Raises:
        TypeError: a count is not an integer.
        ValueError: a value is out of range; the message names the field.
    """

    bits: int = 3
    embedding_bits: int | None = None
    overrides: Mapping[str, int | None] = field(default_factory=dict)
    vector_length: int = 1
    num_groups: int = 1
    iterations: int = 1
    epsilon: float = 0.0
    temperature: float = 0.03
    final_temperature: float = 0.002
    num_steps: int = 1700
    table_dtype: str | None = None

    def __post_init__(self) -> None:
        _check_count("bits", self.bits, maximum=8)
        for name in ("vector_length", "num_groups", "iterations", "num_steps"):
            _check_count(name, getattr(self, name))
        if self.embedding_bits is not None:
            _check_count("embedding_bits", self.embedding_bits, maximum=8)
        for pattern, bits in self.overrides.items():
            if bits is not None:
                _check_count(f"overrides[{pattern!r}]", bits, maximum=8)
        if self.table_dtype not in _TABLE_DTYPES:
            raise ValueError(f"DKMConfig.table_dtype is {self.table_dtype!r}: give one of {_TABLE_DTYPES}")
        # The caller's own dict may change later; this record may not.
        object.__setattr__(self, "overrides", dict(self.overrides))
        _check_temperatures(self.temperature, self.final_temperature)
        if not (math.isfinite(self.epsilon) and self.epsilon >= 0):
            raise ValueError(f"DKMConfig.epsilon is {self.epsilon}: give a finite number, 0 or above")

    def temperature_at(self, step: int) -> float:
        """The temperature of a step, counted from 0, in units of the weight's variance."""
        progress = min(1.0, step / max(1, self.num_steps - 1))
        return float(self.temperature * (self.final_temperature / self.temperature) ** progress)


def _check_count(name: str, value: int, *, maximum: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"DKMConfig.{name} is {value!r} of type {type(value).__name__}: give an integer")
    if value < 1 or (maximum is not None and value > maximum):
        limits = "1 or more" if maximum is None else f"1 to {maximum}"
        raise ValueError(f"DKMConfig.{name} is {value}: give {limits}")


def _check_temperatures(first: float, last: float) -> None:
    if not (math.isfinite(first) and 0 < last <= first):
        raise ValueError(
            f"DKMConfig.temperature falls from {first} to {last}: "
            "give finite numbers above 0, the last not above the first"
        )
