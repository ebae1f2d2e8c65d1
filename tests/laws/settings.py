"""What every law is run over: each way to set a store up, and each codec forced wherever it can be."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from gc import disable, enable, isenabled

import torch
from torch import Tensor

from offload import SavedTensorStore
from offload.codecs import DEFAULT_CODECS
from offload.codecs.base import Codec
from offload.codecs.raw import Raw
from offload.testing import Forced


def whole_way(store: SavedTensorStore) -> SavedTensorStore:
    """Return the store as it is where `offload/_fast.c` was not compiled."""
    store._short_way = lambda: None  # type: ignore[method-assign]
    return store


CODECS: Sequence[Codec] = (*DEFAULT_CODECS, Raw())
STORES: Mapping[str, Callable[[], SavedTensorStore]] = {
    "at least 4 KiB": partial(SavedTensorStore, min_bytes=4096),
    "dedupe": partial(SavedTensorStore, min_bytes=0),
    "dedupe, whole way": lambda: whole_way(SavedTensorStore(min_bytes=0)),
    "uniquify": partial(SavedTensorStore, min_bytes=0, uniquify=True),
    "copies": partial(SavedTensorStore, min_bytes=0, dedupe=False),
    "encoded copies": partial(SavedTensorStore, min_bytes=0, dedupe=False, uniquify=True),
    "forced": partial(SavedTensorStore, min_bytes=0, uniquify=[Forced(codec) for codec in CODECS]),
    **{
        f"forced {codec.name}": partial(SavedTensorStore, min_bytes=0, uniquify=[Forced(codec)])
        for codec in CODECS
    },
    "forced copies": partial(
        SavedTensorStore, min_bytes=0, dedupe=False, uniquify=[Forced(codec) for codec in CODECS]
    ),
}
Around = AbstractContextManager[object]


def plain() -> Around:
    """Return the context of a run without hooks."""
    return nullcontext()


def bits(tensor: Tensor | None) -> bytes:
    """Return dtype, shape and bytes: -0.0 is not 0.0 and a NaN equals itself."""
    if tensor is None:
        return b"no gradient"
    dense = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    described = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return described + dense.view(-1).view(torch.uint8).numpy().tobytes()


@contextmanager
def no_gc() -> Iterator[None]:
    """Run without the cycle collector, so that only reference counts free."""
    was_enabled = isenabled()
    disable()
    try:
        yield
    finally:
        if was_enabled:
            enable()
