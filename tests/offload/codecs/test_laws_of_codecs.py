"""Every codec is run through the laws of `offload.testing`; a codec that is missing here fails."""

import importlib
import inspect
import pkgutil

import pytest
import torch

import offload.codecs
from offload.codecs import DEFAULT_CODECS
from offload.codecs.base import Block, Codec, Payload
from offload.codecs.bits import Bits
from offload.codecs.cast import Cast
from offload.codecs.index_list import IndexLists
from offload.codecs.keyed import Keyed
from offload.codecs.raw import Raw, RawPayload
from offload.codecs.rows import Rows
from offload.testing import CodecLaws, Forced


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
    from offload.stats import Ledger

    return IndexLists(Ledger())


def test_no_codec_is_left_out() -> None:
    found = set()
    for module in pkgutil.iter_modules(offload.codecs.__path__, "offload.codecs."):
        members = inspect.getmembers(importlib.import_module(module.name), inspect.isclass)
        found |= {each for _, each in members if issubclass(each, Codec) and not inspect.isabstract(each)}
    tested = {type(laws().codec()) for laws in (TestRaw, TestBits, TestNarrow, TestRows, TestKeyed)}
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
