"""Find the distinct rows of a block and each row's number among them: an exact hash table in tensor
operations.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload.codecs.packing import bits_for

MAX_DISTINCT = 1 << 16
"""Above this many distinct rows an index takes more than 16 bits and is not made."""

_CHUNK_BYTES = 1 << 22
_FIRST_CHUNK_ROWS = 1024
_SAMPLE_WORK = 2  # a sample of 2 * sqrt(2 D) rows has 4 expected pairs of equal rows among D distinct ones
_MIN_SAMPLE = 64
_LINE_BYTES = 64
_GOLDEN = 0x9E3779B97F4A7C15


class DistinctRows:
    """The distinct rows seen so far, at most `limit` of them, and the first place of each."""

    def __init__(self, lanes: Tensor, *, limit: int) -> None:
        self._bits = bits_for(16 * limit)
        # One slot a hash value, and room behind the last for probing without a wrap. An empty slot names row
        # 0, which is always in the table: the comparison that every row goes through anyway tells whether
        # that is right.
        num_slots = (1 << self._bits) + limit + 1
        self._slots = torch.zeros(num_slots, dtype=torch.int32, device=lanes.device)
        self._taken = torch.zeros(num_slots, dtype=torch.bool, device=lanes.device)
        self._multipliers = torch.from_numpy(_multipliers(lanes.shape[1])).to(lanes.device)
        self._rows = lanes.new_empty((limit, *_item_shape(lanes)))
        self._first = torch.empty(limit, dtype=torch.int32, device=lanes.device)
        self._limit = limit
        self._count = 0
        first_row = lanes[:1]
        self._claim(
            first_row.view(-1, *_item_shape(lanes)),
            self._hash(first_row),
            torch.zeros(1, dtype=torch.int64, device=lanes.device),
        )

    @property
    def table(self) -> Tensor:
        """The distinct rows, `[R, L]`, a copy."""
        return self._rows[: self._count].clone().view(self._count, -1)

    @property
    def first(self) -> Tensor:
        """A row number at which each distinct row stands, int32 `[R]`."""
        return self._first[: self._count].clone()

    def number(self, rows: Tensor, *, start: int) -> Tensor | None:
        """Return each row's number among the distinct rows, int32 `[n]`, or None once there are more than the
        limit.

        `rows` is `[n, L]`; `start` is the number of the first of them in the block. Every row is compared
        with the table: the hash only says where to look.
        """
        place = self._hash(rows)
        rows = rows.view(-1, *_item_shape(rows))
        number, same = self._look_up(rows, place)
        if same.all():
            return number
        todo = (~same).nonzero().squeeze(1)
        while todo.numel():
            place_todo, rows_todo = place[todo], rows[todo]
            if not self._claim(rows_todo, place_todo, todo + start):
                return None
            found, same = self._look_up(rows_todo, place_todo)
            number[todo[same]] = found[same]
            todo = todo[~same]
            place[todo] += 1
        return number

    def _look_up(self, rows: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        number = self._slots.index_select(0, place)
        same = (self._rows.index_select(0, number) == rows).view(len(rows), -1)
        return number, same.all(1) if same.shape[1] > 1 else same.view(-1)

    def _claim(self, rows: Tensor, place: Tensor, where: Tensor) -> bool:
        """Give each empty slot at which `rows` stand to one of them; False when that makes too many."""
        free = ~self._taken[place]
        rows, place, where = rows[free], place[free], where[free]
        claim = torch.arange(place.numel(), dtype=torch.int32, device=place.device)
        self._slots[place] = claim
        won = self._slots[place] == claim
        rows, place, where = rows[won], place[won], where[won]
        new_count = self._count + place.numel()
        if new_count > self._limit:
            return False
        self._slots[place] = torch.arange(self._count, new_count, dtype=torch.int32, device=place.device)
        self._taken[place] = True
        self._rows[self._count : new_count] = rows
        self._first[self._count : new_count] = where
        self._count = new_count
        return True

    def _hash(self, rows: Tensor) -> Tensor:
        mixed = rows.to(torch.int64) * self._multipliers
        mixed = mixed.sum(1) if rows.shape[1] > 1 else mixed.view(-1)
        mixed ^= mixed >> 32
        mixed *= self._multipliers[0]
        mixed >>= 63 - self._bits
        mixed &= (1 << self._bits) - 1
        return mixed


def number_rows(lanes: Tensor, *, limit: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return `(table [R, L], index int32 [N], first int32 [R])` of the rows of `lanes` `[N, L]`, or None if R
    would exceed `limit`.

    `table[index]` is `lanes` bit for bit. Reads chunk by chunk, so a block with too many rows costs a part of
    a pass.
    """
    limit = min(limit, MAX_DISTINCT, lanes.shape[0])
    if limit < 1:
        return None
    distinct = DistinctRows(lanes, limit=limit)
    index = torch.empty(lanes.shape[0], dtype=torch.int32, device=lanes.device)
    start, num_chunk_rows = 0, _FIRST_CHUNK_ROWS
    while start < lanes.shape[0]:
        number = distinct.number(lanes[start : start + num_chunk_rows], start=start)
        if number is None:
            return None
        index[start : start + num_chunk_rows] = number
        start += num_chunk_rows
        # Most distinct rows are met early: new ones, which cost most, come in small chunks.
        num_chunk_rows = min(8 * num_chunk_rows, max(_FIRST_CHUNK_ROWS, chunk_rows(lanes)))
    return distinct.table, index, distinct.first


def chunk_rows(lanes: Tensor) -> int:
    """Return how many rows of `lanes` to work on at once, so that a pass stays in cache."""
    return max(1, _CHUNK_BYTES // (lanes.shape[1] * 8))


@dataclass(frozen=True)
class Sample:
    """Some rows of a block, or 64 bytes from the middle of each, `[S, L]` on the host.

    `limit` is the most distinct rows that the block may have to be worth a table.
    """

    rows: NDArray[Any]
    num_rows: int
    limit: int

    def num_distinct(self) -> int | None:
        """Estimate the distinct rows of the block; None when more than the limit.

        Chao's estimate: rows that the sample has once, and twice, tell how many it has not seen. A block half
        of zeros and half of distinct values has few pairs but many singles, and is told apart.
        """
        rows = self.rows
        if rows.shape[1] > 1:
            rows = rows.view(f"S{rows.shape[1] * rows.itemsize}")
        num_times = list(Counter(rows.reshape(-1).tolist()).values())
        num_seen = len(num_times)
        if len(rows) < self.num_rows:
            num_once = num_times.count(1)
            if num_once == len(rows):
                return None
            num_seen += num_once * (num_once - 1) // (2 * (num_times.count(2) + 1))
        return num_seen if num_seen <= self.limit else None


def draw_sample(lanes: Tensor, *, limit: int, factor: int = 1, run_bytes: int = _LINE_BYTES) -> Sample:
    """Return a sample of `lanes` `[N, L]`, large enough to tell whether at most `limit` rows are distinct.

    Taken in runs of `run_bytes`, a cache line, from places spread over the block: on a large block a sample
    costs its cache misses. `factor` times the usual size.
    """
    num_rows, num_lanes = lanes.shape
    size = min(num_rows, factor * max(_MIN_SAMPLE, int(_SAMPLE_WORK * (2 * limit) ** 0.5)))
    row_bytes = num_lanes * lanes.element_size()
    if size < num_rows:
        run = max(1, run_bytes // row_bytes)
        num_runs = -(-size // run) | 1  # odd, so that the places do not keep time with powers of two
        step = num_rows // num_runs
        lanes = lanes[: num_runs * step].view(num_runs, step, num_lanes)[:, : min(run, step)]
    if row_bytes > _LINE_BYTES:
        middle = num_lanes // 2
        lanes = lanes[..., middle : middle + _LINE_BYTES // lanes.element_size()]
    # A copy first: numpy() on the saved tensor's own storage would make it non-resizable for ever.
    rows = lanes.clone(memory_format=torch.contiguous_format).cpu().numpy()
    return Sample(rows.reshape(-1, rows.shape[-1]), num_rows, limit)


def _multipliers(num_lanes: int) -> NDArray[np.int64]:
    # Odd, and far from each other's multiples (splitmix64); fixed, so that a run can be repeated.
    state = [(_GOLDEN * (lane + 1)) & (2**64 - 1) for lane in range(num_lanes)]
    mixed = [((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1) for z in state]
    return np.array([z | 1 for z in mixed], dtype=np.uint64).view(np.int64)


def _item_shape(lanes: Tensor) -> tuple[int, ...]:
    # A look-up of scalars is several times faster than one of rows of one lane.
    return (lanes.shape[1],) if lanes.shape[1] > 1 else ()
