"""DTensors: what is saved is their local tensor, around which the same DTensor is put again."""

import sys
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from offload.errors import StaleTensorError

_LOCAL = "_local_tensor"


class _Openable(Protocol):
    @property
    def is_reference(self) -> bool: ...

    def open(self) -> Tensor: ...

    def open_own(self) -> Tensor: ...


class Distributed:
    """What autograd keeps for a DTensor: a handle of its local tensor, and how it is spread over the mesh.

    Args:
        tensor: a DTensor.
        pack_local: gives the handle of a local tensor.
    """

    __slots__ = ("_context", "_counter", "_handle", "_inner", "_shape", "_stride", "_type", "_version")

    def __init__(self, tensor: Tensor, *, pack_local: "Callable[[Tensor], _Openable]") -> None:
        names, self._context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        self._inner = {name: getattr(tensor, name) for name in names if name != _LOCAL}
        self._handle = pack_local(getattr(tensor, _LOCAL))
        # An in-place operator on a DTensor moves the DTensor's version counter and not its local tensor's.
        self._counter = tensor.detach()
        setattr(self._counter, _LOCAL, torch.empty(0))
        self._version = tensor._version
        self._type = type(tensor)
        self._shape = tensor.shape
        self._stride = tensor.stride()

    @property
    def is_reference(self) -> bool:
        """Whether the local tensor is kept by reference."""
        return self._handle.is_reference

    def open(self) -> Tensor:
        """Return the DTensor as it was saved, or raise StaleTensorError."""
        has_moved = self._counter._version != self._version
        if has_moved and self._handle.is_reference:
            raise StaleTensorError(
                f"backward needs a saved DTensor of shape {tuple(self._shape)}, kept by reference, but "
                f"it is at version {self._counter._version} and was saved at version {self._version}: it was "
                "changed in place after it was saved. Change a clone, or move the change behind backward."
            )
        # What its counter saw moved no counter of the local tensor, which would seem to be written blindly.
        handle = self._handle
        local = handle.open_own() if has_moved else handle.open()
        inner = self._inner | {_LOCAL: local}
        unflatten = self._type.__tensor_unflatten__  # type: ignore[attr-defined]
        whole: Tensor = unflatten(inner, self._context, self._shape, self._stride)
        return whole.detach()

    def open_own(self) -> Tensor:
        """Return it as `open` does: what was written blindly is asked of the local tensor."""
        return self.open()


def is_distributed(tensor: Tensor) -> bool:
    """Return whether `tensor` is a DTensor around an ordinary local tensor, not one still on its way."""
    module = sys.modules.get("torch.distributed.tensor")  # without it there are none
    return (
        module is not None
        and isinstance(tensor, module.DTensor)
        and type(getattr(tensor, _LOCAL, None)) is Tensor
    )
