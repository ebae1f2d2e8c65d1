"""Every codec is run through the laws of `offload.testing`; a codec that is missing here fails."""

import importlib
import inspect
import pkgutil
from functools import partial

import pytest
import torch
from torch import Tensor

import offload.codecs
from offload.codecs import DEFAULT_CODECS
from offload.codecs.base import Block, Codec, Payload
from offload.codecs.bits import Bits
from offload.codecs.cast import Cast
from offload.codecs.index_list import IndexLists
from offload.codecs.keyed import Keyed
from offload.codecs.raw import Raw, RawPayload
from offload.codecs.rows import Rows
from offload.codecs.tensor_keyed import TensorKeyed
from offload.handle import kept_of
from offload.layout import block_of, lift
from offload.ledger import Ledger
from offload.testing import CodecLaws, Forced, awkward_tensors


class TestRaw(CodecLaws):
    def codec(self) -> Codec:
        return Raw()


class TestBits(CodecLaws):
    def codec(self) -> Codec:
        return Bits()


class TestNarrow(CodecLaws):
    def codec(self) -> Codec:
        return Cast()


class TestRows(CodecLaws):
    def codec(self) -> Codec:
        return Rows()


class TestKeyed(CodecLaws):
    def codec(self) -> Codec:
        return Keyed()


class TestTensorKeyed(CodecLaws):
    """With a key at hand for each block: the numbers of its rows, or of its scalars, as 16-bit patterns."""

    def codec(self) -> Codec:
        return TensorKeyed()

    def _encode(self, tensor: Tensor, *, limit_bytes: int) -> tuple[Block, Payload | None, Ledger]:
        layout, source = lift(tensor.clone())
        block, _ = block_of(source, layout, whole_storage=True)
        ledger = Ledger()
        lists = IndexLists(ledger)
        for width in (block.row_bytes, block.item_bytes):
            key = key_of(block.lanes(width))
            if key is not None:
                lists.tensors.add(key, find=partial(kept_of, key), kept_bytes=0)
        return block, self.codec().encode(block, limit_bytes=limit_bytes, lists=lists), ledger

    def test_it_encodes_what_has_a_key(self) -> None:
        encoded = [self._encode(tensor, limit_bytes=1 << 62)[1] is not None for tensor in awkward_tensors()]
        assert sum(encoded) >= len(encoded) // 2


def key_of(lanes: Tensor | None) -> Tensor | None:
    """Return the number of each row among the distinct ones, as a 16-bit pattern."""
    if lanes is None:
        return None
    numbers = lanes.unique(dim=0, return_inverse=True)[1]
    return numbers.to(torch.int16).view(torch.bfloat16)


class TestForcedBits(CodecLaws):
    """The wrapper keeps every law but the seventh, which it is made to break."""

    def codec(self) -> Codec:
        return Forced(Bits())

    def test_law_7_a_payload_keeps_its_limit(self) -> None:
        block = Block(torch.arange(64, dtype=torch.uint8), 1, 1)
        payload = self.codec().encode(block, limit_bytes=1, lists=_no_lists())
        assert payload is not None
        assert payload.num_bytes > 1


def _no_lists() -> IndexLists:
    return IndexLists(Ledger())


def test_no_codec_is_left_out() -> None:
    found = set()
    for module in pkgutil.iter_modules(offload.codecs.__path__, "offload.codecs."):
        members = inspect.getmembers(importlib.import_module(module.name), inspect.isclass)
        found |= {each for _, each in members if issubclass(each, Codec) and not inspect.isabstract(each)}
    classes = (TestRaw, TestBits, TestNarrow, TestRows, TestKeyed, TestTensorKeyed)
    tested = {type(laws().codec()) for laws in classes}
    assert found == tested
    assert {type(codec) for codec in DEFAULT_CODECS} == tested - {Raw}
    assert len({codec.name for codec in DEFAULT_CODECS}) == len(DEFAULT_CODECS)


class Lossy(Codec):
    """Forgets the sign of zero, as a codec on floats would."""

    __slots__ = ()

    name = "lossy"

    def estimate_bytes(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> int | None:
        return block.num_bytes

    def encode(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> Payload | None:
        lanes = block.lanes(4)
        if lanes is None or block.num_bytes > limit_bytes:
            return None
        return RawPayload((lanes.view(torch.float32) + 0.0).view(-1).view(torch.uint8))


class Follower(Codec):
    """Keeps the tensor's own bytes."""

    __slots__ = ()

    name = "follower"

    def estimate_bytes(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> int | None:
        return block.num_bytes

    def encode(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> Payload | None:
        return RawPayload(block.flat) if block.num_bytes <= limit_bytes else None


class Fat(Codec):
    """Does not look at its limit."""

    __slots__ = ()

    name = "fat"

    def estimate_bytes(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> int | None:
        return 0

    def encode(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> Payload | None:
        return RawPayload(block.flat.clone())


@pytest.mark.parametrize(
    ("codec", "broken"),
    [
        (Lossy(), "test_law_1_the_bytes_come_back"),
        (Lossy(), "test_law_1_gradients_through_a_store_are_equal"),
        (Follower(), "test_law_4_a_payload_does_not_follow_the_tensor"),
        (Fat(), "test_law_7_a_payload_keeps_its_limit"),
    ],
    ids=lambda each: each.name if isinstance(each, Codec) else each,
)
def test_the_laws_see_a_codec_that_breaks_them(codec: Codec, *, broken: str) -> None:
    class Laws(CodecLaws):
        def codec(self) -> Codec:
            return codec

    with pytest.raises(AssertionError):
        getattr(Laws(), broken)()
