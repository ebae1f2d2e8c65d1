"""Which saved tensors the stages may touch, and which are kept by reference as they are."""

from enum import Enum

import torch
from torch import Tensor, nn

from offload.distributed import is_distributed
from offload.layout import Layout

# A view this much smaller than a large storage (a batch cut from a memory-mapped file, a step of a long
# sequence) is not worth reading all of the storage for.
_WINDOW_FRACTION = 16
_LARGE_BYTES = 1 << 20


class Kind(Enum):
    """What a saved tensor is to the store."""

    PARAMETER = "parameter"
    OPAQUE = "opaque"
    DISTRIBUTED = "distributed"
    PLAIN = "plain"


def is_parameter(tensor: Tensor) -> bool:
    """Return whether `tensor` is a parameter or a view of one."""
    base = tensor._base
    root = tensor if base is None else base
    kind = type(root)
    # isinstance(_, Parameter) runs Python: asked only where it cannot be told at once.
    return kind is nn.Parameter or (kind is not Tensor and isinstance(root, nn.Parameter))


def kind_of(tensor: Tensor) -> Kind:
    """Return how `tensor` is treated: a parameter or a view of one, plain, a DTensor around a plain local
    tensor, or one without plain readable storage.

    FSDP frees and refills the storage of its parameters between pack and unpack, so they must never be
    copied.
    """
    if is_parameter(tensor):
        return Kind.PARAMETER
    if plain_storage(tensor) is not None:
        return Kind.PLAIN
    return Kind.DISTRIBUTED if is_distributed(tensor) else Kind.OPAQUE


def plain_storage(tensor: Tensor) -> torch.UntypedStorage | None:
    """Return the storage of a tensor whose bytes can be read as they lie, None for any other: asked with few
    questions, since the caches are cold when a save asks them.
    """
    if type(tensor) is not Tensor or tensor.is_quantized or tensor.is_nested:
        return None
    try:
        storage = tensor.untyped_storage()
        return storage if storage.data_ptr() or not (storage.nbytes() or tensor.is_meta) else None
    except RuntimeError:  # sparse ones, zeros of forward-mode AD, functorch's wrappers: they show no storage
        return None


def is_readable(layout: Layout, num_bytes: int) -> bool:
    """Return whether a storage of so many bytes is to be read for a view: not where it was shrunk before the
    save, and would have to grow to be read, nor where the view is but a small part of it.
    """
    return layout.span()[1] <= num_bytes and not is_window(layout, storage_bytes=num_bytes)


def is_window(layout: Layout, *, storage_bytes: int) -> bool:
    """Return whether a view reaches so little of its storage that hashing all of it would cost more than it
    can win.
    """
    if storage_bytes <= _LARGE_BYTES:
        return False
    return layout.span_bytes() * _WINDOW_FRACTION < storage_bytes
