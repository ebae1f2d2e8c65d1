"""Find the distinct rows of a block and each row's number among them: an exact hash table in tensor operations."""

import torch
from torch import Tensor

from offload.codecs.packing import bits_for

MAX_DISTINCT = 1 << 16
"""Above this many distinct rows an index takes more than 16 bits and is not made."""

_CHUNK_BYTES = 1 << 22
_SAMPLE_WORK = 4  # a sample of 4 * sqrt(2 D) rows has 16 expected pairs of equal rows among D distinct ones
_SAMPLE_LANES = 8
_GOLDEN = 0x9E3779B97F4A7C15


class DistinctRows:
    """The distinct rows seen so far, at most `limit` of them, and the first place of each."""

    def __init__(self, lanes: Tensor, *, limit: int) -> None:
        self._bits = bits_for(4 * limit) + 1
        # One slot a hash value, and room behind the last for probing without a wrap.
        self._slots = torch.full(((1 << self._bits) + limit + 1,), -1, dtype=torch.int64, device=lanes.device)
        self._multipliers = _multipliers(lanes.shape[1], lanes.device)
        self._rows = lanes.new_empty(limit, lanes.shape[1])
        self._first = torch.empty(limit, dtype=torch.int64, device=lanes.device)
        self._limit = limit
        self.count = 0

    @property
    def table(self) -> Tensor:
        """The distinct rows, `[count, L]`, a copy."""
        return self._rows[: self.count].clone()

    @property
    def first(self) -> Tensor:
        """A row number at which each distinct row stands, int32 `[count]`."""
        return self._first[: self.count].to(torch.int32)

    def number(self, rows: Tensor, *, start: int) -> Tensor | None:
        """Return each row's number among the distinct rows, int64 `[n]`, or None once there are more than the limit.

        `rows` is `[n, L]`; `start` is the number of the first of them in the block. Every row is compared with the table: the hash only
        says where to look.
        """
        position = self._hash(rows)
        number = self._slots[position]
        wrong = self._differs(rows, number)
        if not wrong.any():
            return number
        todo = wrong.nonzero().squeeze(1)
        while todo.numel():
            if not self._claim(rows, todo, position, start):
                return None
            found = self._slots[position[todo]]
            same = ~self._differs(rows[todo], found)
            number[todo[same]] = found[same]
            todo = todo[~same]
            position[todo] += 1
        return number

    def _claim(self, rows: Tensor, todo: Tensor, position: Tensor, start: int) -> bool:
        """Give the empty slots at which `todo` rows stand to one row each; False when there are too many rows."""
        place = position[todo]
        free = self._slots[place] < 0
        rows_here, place = todo[free], place[free]
        claim = torch.arange(-2, -2 - place.numel(), -1, device=place.device)
        self._slots[place] = claim
        won = self._slots[place] == claim
        rows_here, place = rows_here[won], place[won]
        new_count = self.count + place.numel()
        if new_count > self._limit:
            return False
        self._slots[place] = torch.arange(self.count, new_count, device=place.device)
        self._rows[self.count : new_count] = rows[rows_here]
        self._first[self.count : new_count] = rows_here + start
        self.count = new_count
        return True

    def _differs(self, rows: Tensor, number: Tensor) -> Tensor:
        same = self._rows.index_select(0, number.clamp(min=0)) == rows
        return ~(same.all(1) if same.shape[1] > 1 else same.squeeze(1)) | (number < 0)

    def _hash(self, rows: Tensor) -> Tensor:
        mixed = rows.to(torch.int64) * self._multipliers
        mixed = mixed.sum(1) if rows.shape[1] > 1 else mixed.squeeze(1)
        mixed ^= mixed >> 32
        mixed *= self._multipliers[0]
        return (mixed >> (63 - self._bits)) & ((1 << self._bits) - 1)


def number_rows(lanes: Tensor, *, limit: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return `(table [R, L], index int32 [N], first int32 [R])` of the rows of `lanes` `[N, L]`, or None if R would exceed `limit`.

    `table[index]` is `lanes` bit for bit. Reads chunk by chunk, so a block with too many rows costs a part of a pass.
    """
    limit = min(limit, MAX_DISTINCT, lanes.shape[0])
    if limit < 1:
        return None
    distinct = DistinctRows(lanes, limit=limit)
    index = torch.empty(lanes.shape[0], dtype=torch.int32, device=lanes.device)
    step = chunk_rows(lanes)
    for start in range(0, lanes.shape[0], step):
        number = distinct.number(lanes[start : start + step], start=start)
        if number is None:
            return None
        index[start : start + step] = number
    return distinct.table, index, distinct.first


def chunk_rows(lanes: Tensor) -> int:
    """Return how many rows of `lanes` to work on at once, so that a pass stays in cache."""
    return max(1, _CHUNK_BYTES // (lanes.shape[1] * 8))


def sample_distinct(lanes: Tensor, *, limit: int) -> int | None:
    """Estimate the distinct rows of `lanes` `[N, L]` from a sample, or None when they look more than `limit`.

    The sample is fixed (no random state is touched). Pairs of equal rows in it tell the number by the birthday bound; all of up to
    8 lanes of a row are looked at.
    """
    num_rows = lanes.shape[0]
    limit = min(limit, MAX_DISTINCT)
    size = min(num_rows, max(64, int(_SAMPLE_WORK * (2 * limit) ** 0.5)))
    if limit < 1:
        return None
    sample = lanes.index_select(0, sample_places(num_rows, size, lanes.device))
    if sample.shape[1] > _SAMPLE_LANES:
        sample = sample[:, :: -(-sample.shape[1] // _SAMPLE_LANES)]
    mixed = (sample.to(torch.int64) * _multipliers(sample.shape[1], lanes.device)).sum(1)
    num_seen = len(set(mixed.tolist()))
    num_equal = size - num_seen
    if num_seen > limit or num_equal == 0:
        return num_seen if size == num_rows and num_seen <= limit else None
    estimate = max(num_seen, size * size // (2 * num_equal) if num_equal < size // 2 else num_seen)
    return estimate if estimate <= limit else None


def sample_places(num_rows: int, size: int, device: torch.device) -> Tensor:
    """Return `size` row numbers below `num_rows`, int64, spread without a period."""
    steps = torch.arange(size, device=device)
    if size == num_rows:
        return steps
    return ((steps * 0x9E3779B1 & 0xFFFFFFFF) * num_rows) >> 32


def _multipliers(num_lanes: int, device: torch.device) -> Tensor:
    # Odd, and far from each other's multiples (splitmix64); fixed, so that a run can be repeated.
    state = [(_GOLDEN * (lane + 1)) & (2**64 - 1) for lane in range(num_lanes)]
    mixed = [((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1) for z in state]
    signed = [(z | 1) - 2**64 if z >= 2**63 else z | 1 for z in mixed]
    return torch.tensor(signed, dtype=torch.int64, device=device)
