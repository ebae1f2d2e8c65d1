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


def kind_of(tensor: Tensor) -> Kind:
    """Return how `tensor` is treated: a parameter or a view of one, plain, a DTensor around a plain local
    tensor, or one without plain readable storage.

    FSDP frees and refills the storage of its parameters between pack and unpack, so they must never be
    copied.
    """
    root = tensor if tensor._base is None else tensor._base
    # isinstance(_, Parameter) runs Python: asked only where it cannot be told at once.
    if type(root) is nn.Parameter or (type(root) is not Tensor and isinstance(root, nn.Parameter)):
        return Kind.PARAMETER
    if has_plain_storage(tensor):
        return Kind.PLAIN
    return Kind.DISTRIBUTED if is_distributed(tensor) else Kind.OPAQUE


def plain_storage(tensor: Tensor) -> torch.UntypedStorage | None:
    """Return the storage of a tensor that is `Kind.PLAIN`, None for any other: what most saves are, told with
    few questions, since the caches are cold when a save asks them.
    """
    if type(tensor) is not Tensor:
        return None
    base = tensor._base
    # isinstance(_, Parameter) runs Python, and no plain tensor is one.
    if (
        base is not None
        and type(base) is not Tensor
        and (type(base) is nn.Parameter or isinstance(base, nn.Parameter))
    ):
        return None
    return _readable_storage(tensor)


def is_window(layout: Layout, *, storage_bytes: int) -> bool:
    """Return whether a view reaches so little of its storage that hashing all of it would cost more than it
    can win.
    """
    if storage_bytes <= _LARGE_BYTES:
        return False
    return layout.span_bytes() * _WINDOW_FRACTION < storage_bytes


def has_plain_storage(tensor: Tensor) -> bool:
    """Return whether the bytes of `tensor` can be read as they lie."""
    return type(tensor) is Tensor and _readable_storage(tensor) is not None


def _readable_storage(tensor: Tensor) -> torch.UntypedStorage | None:
    if tensor.is_quantized or tensor.is_nested:
        return None
    try:
        storage = tensor.untyped_storage()
        return storage if storage.data_ptr() or not (storage.nbytes() or tensor.is_meta) else None
    except RuntimeError:  # sparse ones, zeros of forward-mode AD, functorch's wrappers: they show no storage
        return None
