"""Every way to change a saved tensor in place: those that PyTorch's counter sees, and those it does not."""

import ctypes
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Write = Callable[[Tensor], object]


def write_out(x: Tensor) -> None:
    torch.add(x, 1, out=x)


def write_set(x: Tensor) -> None:
    x.set_(torch.full_like(x, 7.0))


def write_resize(x: Tensor) -> None:
    x.resize_(x.numel() // 2)


def write_item(x: Tensor) -> None:
    x[0] = 7.0


def write_patterns(x: Tensor) -> None:
    x.view(torch.int32).bitwise_not_()


def write_masked(x: Tensor) -> None:
    x[x > -9] = 7.0


SEEN: Mapping[str, Write] = {
    "add_": lambda x: x.add_(1),
    "mul_": lambda x: x.mul_(3),
    "copy_": lambda x: x.copy_(torch.randn_like(x)),
    "zero_": lambda x: x.zero_(),
    "normal_": lambda x: x.normal_(),
    "item": write_item,
    "mask": write_masked,
    "index_fill_": lambda x: x.index_fill_(0, torch.tensor([1]), 7.0),
    "view": lambda x: x[:1].add_(1),
    "transposed view": lambda x: x.t().mul_(2),
    "strided view": lambda x: x.as_strided((3,), (2,), x.storage_offset()).fill_(7.0),
    "dtype view": write_patterns,
    "detach": lambda x: x.detach().add_(1),
    "view of detach": lambda x: x.detach()[1:].neg_(),
    "foreach": lambda x: torch._foreach_mul_([x, x.clone()], 2),
    "out=": write_out,
    "set_": write_set,
    "resize_": write_resize,
    "t_": lambda x: x.t_(),
    "init": lambda x: torch.nn.init.ones_(x),
}


def write_numpy(x: Tensor) -> None:
    x.detach().numpy()[...] += 1


def write_storage_bytes(x: Tensor) -> None:
    storage = x.untyped_storage()
    storage.copy_(torch.arange(storage.nbytes()).to(torch.uint8).untyped_storage())


def write_replaced_data(x: Tensor) -> None:
    x.data = torch.full_like(x, 7.0)


def write_memory(x: Tensor) -> None:
    ctypes.memset(x.data_ptr(), 1, 64)


def write_uncounted(x: Tensor) -> None:
    with torch.autograd._unsafe_preserve_version_counter(x):
        x.add_(1)


BLIND: Mapping[str, Write] = {
    "data.add_": lambda x: x.data.add_(1),
    "data view": lambda x: x.data[0].fill_(7.0),
    "data =": write_replaced_data,
    "numpy": write_numpy,
    "storage.fill_": lambda x: x.untyped_storage().fill_(1),
    "storage.copy_": write_storage_bytes,
    "dlpack": lambda x: torch.from_dlpack(x.detach()).add_(1),
    "memory": write_memory,
    "uncounted": write_uncounted,
}
