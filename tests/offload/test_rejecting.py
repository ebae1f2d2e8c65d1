"""A tensor that would not win costs a sample, not a pass."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from offload import SavedTensorStore
from offload.codecs import DEFAULT_CODECS
from offload.codecs.base import Block, Codec, Payload
from offload.codecs.index_list import IndexLists
from offload.testing import awkward_tensors

NUM_ITEMS = 1 << 20


class Counting(TorchDispatchMode):
    """Counts the elements that operators write while it is on; views and empty tensors write none."""

    def __init__(self) -> None:
        super().__init__()
        self.num_written = 0

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_new = not func.is_view and not name.startswith(("empty", "set_", "new_empty", "detach"))
        if is_new and isinstance(result, Tensor):
            self.num_written += result.numel()
        return result


class Watched(Codec):
    """A codec whose encoding is counted."""

    __slots__ = ("_codec", "_encoded", "name")

    def __init__(self, codec: Codec, encoded: list[str]) -> None:
        self._codec = codec
        self._encoded = encoded
        self.name = codec.name

    def estimate_bytes(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> int | None:
        return self._codec.estimate_bytes(block, limit_bytes=limit_bytes, lists=lists)

    def encode(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> Payload | None:
        self._encoded.append(self.name)
        return self._codec.encode(block, limit_bytes=limit_bytes, lists=lists)


HOPELESS: Mapping[str, Callable[[], Tensor]] = {
    "fp32": lambda: torch.randn(1024, 1024),
    "bf16": lambda: torch.randn(1024, 1024).bfloat16(),
    "fp16": lambda: torch.randn(1024, 1024).half(),
    "fp64": lambda: torch.randn(1024, 1024).double().exp(),
    "complex64": lambda: torch.randn(1024, 512).to(torch.complex64) * (1 + 2j),
    "int64": lambda: torch.randint(1 << 60, (1024, 1024)),
    "flat": lambda: torch.randn(NUM_ITEMS),
    "half relu": lambda: torch.randn(1024, 1024).relu(),
    "dropped out": lambda: torch.nn.functional.dropout(torch.randn(1024, 1024), 0.5),
    "odd": lambda: torch.randn(1023, 1021),
}


@contextmanager
def saved(x: Tensor, *, encoded: list[str]) -> Iterator[SavedTensorStore]:
    """Save x under watched codecs, beside a mask whose list may serve as a key."""
    store = SavedTensorStore(uniquify=[Watched(codec, encoded) for codec in DEFAULT_CODECS])
    weight, mask = torch.ones_like(x[:0]), x.real.flatten()[: x.numel()] > 0
    with store:
        kept = [Keep.apply(torch.zeros((), requires_grad=True), each) for each in (mask, x)]
    yield store
    del kept, weight


class Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, weight: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return weight.clone()


@pytest.mark.parametrize("name", sorted(HOPELESS))
def test_nothing_is_encoded_where_nothing_wins(name: str) -> None:
    x = HOPELESS[name]()
    encoded: list[str] = []
    with saved(x, encoded=encoded) as store:
        assert store.stats.num_by_stage["reference"] == 1
    assert encoded == ["bits"], "the mask beside it alone"


@pytest.mark.parametrize("name", sorted(HOPELESS))
def test_an_estimate_writes_a_sample(name: str) -> None:
    """Less than a hundredth of the tensor, all codecs together."""
    x = HOPELESS[name]()
    counting = Counting()

    class Asked(Codec):
        """Stands in front of the others and asks each of them, while elements are counted."""

        __slots__ = ()

        name = "asked"

        def estimate_bytes(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> int | None:
            with counting:
                for codec in DEFAULT_CODECS:
                    promised = codec.estimate_bytes(block, limit_bytes=limit_bytes, lists=lists)
                    assert promised is None or promised > limit_bytes
            return None

        def encode(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> Payload | None:
            raise AssertionError("it declined")

    with SavedTensorStore(uniquify=[Asked()]) as store:
        kept = Keep.apply(torch.zeros((), requires_grad=True), x)
    assert store.stats.num_by_stage == {"reference": 1}
    assert 0 < counting.num_written < x.numel() / 50
    del kept


def test_an_estimate_is_near_what_encoding_takes() -> None:
    """A promise that the encoding does not keep costs a pass."""
    for tensor in [*awkward_tensors(), torch.randn(300)[torch.randint(300, (70_000,))]]:
        flat = tensor.clone().contiguous().view(-1).view(torch.uint8)
        for codec in DEFAULT_CODECS:
            block = Block(flat, tensor.dtype.itemsize, max(1, tensor.shape[-1] if tensor.dim() > 1 else 1))
            lists = lists_of()
            promised = codec.estimate_bytes(block, limit_bytes=block.limit_bytes, lists=lists)
            payload = codec.encode(block, limit_bytes=block.limit_bytes, lists=lists)
            if promised is not None and block.num_bytes > 4096:
                assert payload is not None or promised > block.limit_bytes / 2, (tensor.shape, codec.name)


def lists_of() -> IndexLists:
    from offload.ledger import Ledger

    return IndexLists(Ledger())
