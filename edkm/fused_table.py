"""A 16-bit weight as a table of the values that occur: count them, sum over them, look them up.

Three passes that read the weight; in one group nothing here grows with it but what they return. With many
small groups the tables do: they have up to half as many entries as the weight, in float64. A wider weight
may be read through a cast to 16 bits; what is summed, and what is looked up, keeps its width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from edkm.fused_lookup import look_up, look_up_line
from edkm.patterns import NUM_PATTERNS, pattern_counts, pattern_sums, pattern_values

# A table that small beside its weight is kept for backward, which counts the weight again otherwise.
_KEPT_SHARE = 256


@dataclass(frozen=True)
class Table:
    """The bit patterns that occur in a weight, and how often.

    Arguments:
        patterns: `[U]`, int64, as `edkm.patterns` counts them.
        values: `[U]`, float64, what they stand for.
        counts: `[G, U]`, float64, in each group.
        dtype: that the weight is read in, float16 or bfloat16.
    """

    patterns: torch.Tensor
    values: torch.Tensor
    counts: torch.Tensor
    dtype: torch.dtype

    @staticmethod
    def of(weight: torch.Tensor, num_groups: int, *, dtype: torch.dtype) -> Table | None:
        """Count the patterns of a weight that is read in `dtype`, float16 or bfloat16.

        Returns:
            None where as many groups of as many patterns would save no work: there may be half as many
            entries in the table as there are weights, but any number in that of one group.
        """
        total = pattern_counts(weight.reshape(-1), dtype)
        patterns = total.nonzero().squeeze(1)
        if num_groups > 1 and 2 * num_groups * patterns.numel() > weight.numel():
            return None
        if num_groups == 1:
            counts = total[patterns].unsqueeze(0)
        else:
            groups = weight.reshape(num_groups, -1)
            counts = torch.stack([pattern_counts(group, dtype)[patterns] for group in groups])
        values = pattern_values(patterns, dtype)
        return Table(patterns, values.double(), counts.double(), dtype)

    def packed(self, weight: torch.Tensor) -> torch.Tensor | None:
        """Patterns and counts as int32 `[1 + G, U]`, if they are worth keeping beside the weight."""
        num_bytes = 4 * (1 + self.counts.shape[0]) * self.patterns.numel()
        if num_bytes * _KEPT_SHARE > weight.nbytes or weight.numel() > torch.iinfo(torch.int32).max:
            return None
        return torch.cat([self.patterns.unsqueeze(0), self.counts]).to(torch.int32)

    @staticmethod
    def unpacked(packed: torch.Tensor, dtype: torch.dtype) -> Table:
        """Return the table of which `packed` is what it says, of a weight that is read in `dtype`."""
        patterns = packed[0].long()
        return Table(patterns, pattern_values(patterns, dtype).double(), packed[1:].double(), dtype)

    def variance(self) -> torch.Tensor:
        """Variance of the weight as it is read: 0-d, float64."""
        counts = self.counts.sum(dim=0)
        mean = (counts * self.values).sum() / counts.sum()
        return (counts * (self.values - mean).square()).sum() / counts.sum()

    def sums(self, weight: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
        """Sum the `terms` of each pattern's weights, `[G, U]`, float64; `terms` has the weight's shape."""
        sums = [
            pattern_sums(group, self.dtype, terms=beside)[self.patterns]
            for group, beside in self._groups(weight, terms)
        ]
        return torch.stack(sums)

    def look_up(self, weight: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
        """Give each weight its entry of `[G, U]`, in the weight's shape and dtype."""
        result = torch.empty_like(weight, memory_format=torch.contiguous_format)
        tables = self._spread(entries.to(weight.dtype))
        for table, (group, target) in zip(tables, self._groups(weight, result), strict=True):
            look_up(group, table, dtype=self.dtype, into=target)
        return result

    def look_up_line(
        self, weight: torch.Tensor, at: torch.Tensor, *, slope: torch.Tensor, height: torch.Tensor
    ) -> torch.Tensor:
        """Give each weight `slope * at + height` of its entries of `[G, U]`; `at` has the weight's shape."""
        result = torch.empty_like(weight, memory_format=torch.contiguous_format)
        wide = torch.promote_types(weight.dtype, torch.float32)
        lines = zip(self._spread(slope.to(wide)), self._spread(height.to(wide)), strict=True)
        places = zip(self._groups(weight, at), self._groups(weight, result), strict=True)
        for (slopes, heights), ((group, given), (_, target)) in zip(lines, places, strict=True):
            look_up_line(group, given, slope=slopes, height=heights, dtype=self.dtype, into=target)
        return result

    def _groups(self, weight: torch.Tensor, beside: torch.Tensor) -> Iterator[list[torch.Tensor]]:
        num_groups = self.counts.shape[0]
        pairs = zip(weight.reshape(num_groups, -1), beside.reshape(num_groups, -1), strict=True)
        return map(list, pairs)

    def _spread(self, entries: torch.Tensor) -> Iterator[torch.Tensor]:
        """Where any pattern finds its entry: `[65536]` for each group. One that has none finds NaN: such a
        weight was written behind its version counter after its table was kept.
        """
        for each in entries:
            yield each.new_full((NUM_PATTERNS,), math.nan).index_copy_(0, self.patterns, each)
