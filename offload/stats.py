"""What was saved, by whom, and what each stage won."""

import math
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from types import MappingProxyType

import torch


@dataclass(frozen=True)
class Stats:
    """One reading of a store; all sizes in bytes.

    `saved_bytes` and `storage_bytes` count since the outermost enter, parameters and what has no plain
    readable storage left out: the one each save, the other each storage once while it is held. `held_bytes`
    is current; `peak_held_bytes` is the most held since then.
    `num_by_stage` counts saves by what became of them: "parameter", "opaque" and "reference" (kept by
    reference), "storage" and "content" (shared with a living entry), "copy", a codec's name, or "shared" with
    other ranks.

    `group_held_bytes` is what the ranks of the group hold together, each as it last told: exact once all have
    read their stats. `gathered_bytes` came from other ranks, and this rank waited `waited_seconds` for them.
    """

    saved_bytes: int = 0
    storage_bytes: int = 0
    held_bytes: int = 0
    peak_held_bytes: int = 0
    num_saved: int = 0
    num_by_stage: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    group_held_bytes: int = 0
    gathered_bytes: int = 0
    waited_seconds: float = 0.0


_UNASKED = ("parameter", "opaque")
"""Stages whose saves are not counted among `saved_bytes`."""


class Row:
    """All saves of one line of code with one shape and dtype, counted by what became of them."""

    __slots__ = ("dtype", "each_bytes", "kept_bytes", "num_by_stage", "shape", "site")

    def __init__(self, site: str, *, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.site = site
        self.shape = shape
        self.dtype = dtype
        self.each_bytes = math.prod(shape) * dtype.itemsize
        self.begin_step()

    def begin_step(self) -> None:
        """Count from nothing."""
        self.kept_bytes = 0
        self.num_by_stage: dict[str, int] = {}

    def reading(self) -> "Row":
        """Return the row as it is now."""
        row = copy(self)
        row.num_by_stage = dict(self.num_by_stage)
        return row

    @property
    def num_saved(self) -> int:
        """Saves so far."""
        return sum(self.num_by_stage.values())

    @property
    def saved_bytes(self) -> int:
        """Bytes of those that a stage looks at."""
        num_asked = sum(num for stage, num in self.num_by_stage.items() if stage not in _UNASKED)
        return num_asked * self.each_bytes

    def count(self, stage: str, *, kept_bytes: int = 0) -> None:
        """Book one save that ended as `stage` and for which the store came to hold `kept_bytes` more."""
        self.num_by_stage[stage] = self.num_by_stage.get(stage, 0) + 1
        self.kept_bytes += kept_bytes

    def recount(self, stage: str, *, was: str) -> None:
        """Book a save that had ended as `was` under another stage."""
        self.num_by_stage[was] -= 1
        if not self.num_by_stage[was]:
            del self.num_by_stage[was]
        self.count(stage)


class Counts:
    """The counts since the outermost enter, by row."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, torch.Size, torch.dtype], Row] = {}

    def begin_step(self) -> None:
        """Count from nothing; rows without a save in the last step go."""
        self._rows = {key: row for key, row in self._rows.items() if row.num_by_stage}
        for row in self._rows.values():
            row.begin_step()

    def row(self, site: str, *, shape: torch.Size, dtype: torch.dtype) -> Row:
        """Return the row of these saves, a new one at its first."""
        key = (site, shape, dtype)
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = Row(site, shape=tuple(shape), dtype=dtype)
        return row

    def list_rows(self) -> list[Row]:
        """Return the rows that have a save, as they are now."""
        return [row.reading() for row in self._rows.values() if row.num_by_stage]

    def stats(self, held_bytes: int, peak_held_bytes: int) -> Stats:
        """Return the totals as a frozen reading."""
        num_by_stage: dict[str, int] = {}
        for row in self._rows.values():
            for stage, num in row.num_by_stage.items():
                num_by_stage[stage] = num_by_stage.get(stage, 0) + num
        return Stats(
            saved_bytes=sum(row.saved_bytes for row in self._rows.values()),
            held_bytes=held_bytes,
            peak_held_bytes=peak_held_bytes,
            num_saved=sum(row.num_saved for row in self._rows.values()),
            num_by_stage=MappingProxyType(num_by_stage),
        )
