"""DTensors: what is saved is their local tensor, around which the same DTensor is put again."""

import sys
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

_LOCAL = "_local_tensor"


class _Openable(Protocol):
    def open(self) -> Tensor: ...


class Distributed:
    """What autograd keeps for a DTensor: a handle of its local tensor, and how it is spread over the mesh.

    Args:
        tensor: a DTensor.
        pack_local: gives the handle of a local tensor.
    """

    __slots__ = ("_context", "_handle", "_inner", "_shape", "_stride", "_type")

    def __init__(self, tensor: Tensor, *, pack_local: "Callable[[Tensor], _Openable]") -> None:
        names, self._context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        self._inner = {name: getattr(tensor, name) for name in names if name != _LOCAL}
        self._handle = pack_local(getattr(tensor, _LOCAL))
        self._type = type(tensor)
        self._shape = tensor.shape
        self._stride = tensor.stride()

    def open(self) -> Tensor:
        """Return the DTensor as it was saved, or raise StaleTensorError."""
        inner = self._inner | {_LOCAL: self._handle.open()}
        unflatten = self._type.__tensor_unflatten__  # type: ignore[attr-defined]
        whole: Tensor = unflatten(inner, self._context, self._shape, self._stride)
        return whole.detach()


def is_distributed(tensor: Tensor) -> bool:
    """Return whether `tensor` is a DTensor around an ordinary local tensor, not one still on its way."""
    module = sys.modules.get("torch.distributed.tensor")  # without it there are none
    return (
        module is not None
        and isinstance(tensor, module.DTensor)
        and type(getattr(tensor, _LOCAL, None)) is Tensor
    )
