"""How much autograd asks to keep for one forward pass."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def saved_bytes(forward: Callable[[], Any]) -> int:
    """Return the bytes of all saves that are not a parameter's, one count a save."""
    saved = [0]

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            saved[0] += tensor.nbytes
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
    del kept
    return saved[0]


def storage_bytes(forward: Callable[[], Any]) -> int:
    """Return the bytes of all storages that are kept for backward and are not a parameter's."""
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(storage.nbytes() for storage in kept.values())
