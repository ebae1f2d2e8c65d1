"""Lift a view off its storage, lay it back: shape, strides, offset, dtype, conj, neg."""

from typing import NamedTuple

import torch
from torch import Tensor

from offload.codecs.base import Block


class Layout(NamedTuple):
    """How one saved tensor lies on its storage. `offset` and `stride` count items of `dtype`."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    conj: bool
    neg: bool

    def span(self) -> tuple[int, int]:
        """Return the first and one-past-last byte of the storage that the tensor reaches."""
        start = self.offset * self.dtype.itemsize
        return start, start + self.span_bytes()

    def span_bytes(self) -> int:
        """Return how many bytes there are from the first to the last that the tensor reaches."""
        num_items = 1
        for size, step in zip(self.shape, self.stride, strict=True):
            if size == 0:
                return 0
            num_items += (size - 1) * step
        return num_items * self.dtype.itemsize

    def has_gaps(self) -> bool:
        """Return whether the items lie apart, each at a place of its own."""
        if self.shape.numel() == 0:
            return False
        reach = 1
        for step, size in sorted(
            (step, size) for step, size in zip(self.stride, self.shape, strict=True) if size != 1
        ):
            if step < reach:
                return False
            reach += (size - 1) * step
        return reach > self.shape.numel()

    def row_items(self, num_items: int) -> int:
        """Return the items in a row when the tensor covers `num_items` densely in rows of its unit-stride
        dim, else 1.
        """
        if self.shape.numel() != num_items or num_items == 0:
            return 1
        dims = sorted((s, n) for s, n in zip(self.stride, self.shape, strict=True) if n != 1)
        return dims[0][1] if dims and dims[0][0] == 1 else 1


def lift(tensor: Tensor) -> tuple[Layout, Tensor]:
    """Return the layout of a strided tensor without a graph, and the tensor, or a view of it, without conj
    and neg bits, on the same storage and version counter.
    """
    conj, neg = tensor.is_conj(), tensor.is_neg()
    if conj:
        tensor = tensor.conj()
    if neg:
        tensor = torch._neg_view(tensor)
    layout = Layout(tensor.shape, tensor.stride(), int(tensor.storage_offset()), tensor.dtype, conj, neg)
    return layout, tensor


def block_of(source: Tensor, layout: Layout, *, whole_storage: bool) -> tuple[Block, int | None]:
    """Return the bytes to encode as a block, and the number of their first byte in the storage.

    That is the whole storage of `source`, or only what `layout` reaches: from its first byte to its last, or,
    where that has gaps, its items in order, with None for the number.
    """
    storage = source.untyped_storage()
    start, stop = (0, storage.nbytes()) if whole_storage else layout.span()
    item_bytes = layout.dtype.itemsize
    if layout.has_gaps() and not whole_storage:
        flat = source.contiguous().view(-1).view(torch.uint8)
        return Block(flat, item_bytes, layout.shape[-1]), None
    flat = _bytes_of(storage, start, stop)
    return Block(flat, item_bytes, layout.row_items((stop - start) // item_bytes)), start


def flat_of(source: Tensor) -> Tensor:
    """Return the bytes of the whole storage of `source`, uint8 `[num_bytes]`, not a copy."""
    storage = source.untyped_storage()
    return _bytes_of(storage, 0, storage.nbytes())


def _bytes_of(storage: torch.UntypedStorage, start: int, stop: int) -> Tensor:
    flat = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return flat.set_(storage, start, (stop - start,), (1,))


def lay(layout: Layout, alias: Tensor) -> Tensor:
    """Return the tensor that `lift` took apart, on the same storage and with the same version counter."""
    if layout.conj:
        alias = alias.conj()
    return torch._neg_view(alias) if layout.neg else alias


def lay_bytes(layout: Layout, decoded: Tensor, *, start: int | None) -> Tensor:
    """Return a tensor with `layout` on `decoded`, uint8 `[num_bytes]`: the bytes and number of `block_of`."""
    if start is None:
        laid = torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device=decoded.device)
        return lay(layout, laid.copy_(decoded.view(layout.dtype).view(layout.shape)))
    empty = torch.empty(0, dtype=layout.dtype, device=decoded.device)
    return _lay_on(layout, empty, decoded.untyped_storage(), layout.offset - start // layout.dtype.itemsize)


def lay_on(layout: Layout, storage: torch.UntypedStorage) -> Tensor:
    """Return a tensor with `layout` on the storage that it was lifted off."""
    empty = torch.empty(0, dtype=layout.dtype, device=storage.device)
    return _lay_on(layout, empty, storage, layout.offset)


def _lay_on(layout: Layout, empty: Tensor, storage: torch.UntypedStorage, offset: int) -> Tensor:
    return lay(layout, empty.set_(storage, offset, layout.shape, layout.stride))
