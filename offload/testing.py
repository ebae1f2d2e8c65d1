"""The laws as classes: run every codec, ours or yours, through them.

    class TestMyCodec(CodecLaws):
        def codec(self) -> Codec:
            return MyCodec()

pytest collects the inherited tests. They need no other file of this project.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from offload.codecs.base import Block, Codec, Payload
from offload.codecs.index_list import IndexLists
from offload.layout import block_of, lift
from offload.ledger import Ledger
from offload.store import SavedTensorStore

_UNLIMITED_BYTES = 1 << 62


class Forced(Codec):
    """A codec that encodes whatever it can represent, be it larger than the tensor. For tests."""

    __slots__ = ("_codec", "name")

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self.name = codec.name

    def estimate_bytes(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> int | None:
        """Return 0: no codec promises more."""
        return 0

    def encode(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> Payload | None:
        """Return the payload of any size, or None when the codec cannot represent the block."""
        return self._codec.encode(block, limit_bytes=_UNLIMITED_BYTES, lists=lists)


def awkward_tensors() -> list[Tensor]:
    """Return tensors of the shapes and values that hurt, fresh each time: empty, 0-d, odd, NaN, -0.0, masks,
    constants, repeating rows.
    """
    mask = torch.rand(37, 53) > 0.5
    rows = torch.randn(5, 8)[torch.randint(5, (1001,))]
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45]).repeat(300)
    nan_payloads = (
        torch.randint(0x7F80, 0x8000, (999,), dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    )
    return [
        torch.empty(0),
        torch.empty(0, 3, dtype=torch.bfloat16),
        torch.tensor(1.5),
        torch.tensor(True),
        mask,
        mask.double() * 2.5,
        torch.randint(3, (7, 11, 13), dtype=torch.uint8),
        torch.randint(30000, (3, 129)),
        torch.full((511,), -0.0, dtype=torch.float16),
        torch.zeros(1, 1),
        special,
        special.bfloat16(),
        nan_payloads,
        rows,
        rows.bfloat16().to(torch.complex64),
        rows.t(),
        torch.randn(2, 8).to(torch.complex128)[torch.randint(2, (77,))],
        torch.randn(300, 3).bfloat16(),
        torch.randn(129, 65),
        torch.randn(64, 64).bfloat16().float(),
        torch.arange(70001),
    ]


class CodecLaws(ABC):
    """The laws every codec keeps, as tests for pytest. Subclass it and name the codec."""

    @abstractmethod
    def codec(self) -> Codec:
        """Return the codec under test."""

    def test_law_1_the_bytes_come_back(self) -> None:
        for tensor in awkward_tensors():
            block, payload, _ = self._encode(tensor, limit_bytes=_UNLIMITED_BYTES)
            if payload is not None:
                assert torch.equal(payload.decode(), block.flat), (tensor.shape, tensor.dtype)

    def test_law_2_a_payload_gives_back_what_it_was_charged(self) -> None:
        for tensor in awkward_tensors():
            ledger = self._encode(tensor, limit_bytes=_UNLIMITED_BYTES)[2]
            assert ledger.read()[0] == 0, (tensor.shape, tensor.dtype)

    def test_law_3_decoding_repeats_and_shares_nothing(self) -> None:
        for tensor in awkward_tensors():
            block, payload, _ = self._encode(tensor, limit_bytes=_UNLIMITED_BYTES)
            if payload is not None:
                payload.decode().fill_(7)
                assert torch.equal(payload.decode(), block.flat), (tensor.shape, tensor.dtype)

    def test_law_4_a_payload_does_not_follow_the_tensor(self) -> None:
        for tensor in awkward_tensors():
            block, payload, _ = self._encode(tensor, limit_bytes=_UNLIMITED_BYTES)
            before = block.flat.clone()
            block.flat.bitwise_not_()
            assert payload is None or torch.equal(payload.decode(), before), (tensor.shape, tensor.dtype)

    def test_law_7_a_payload_keeps_its_limit(self) -> None:
        for tensor in awkward_tensors():
            for divisor in (1, 2, 5):
                limit_bytes = lift(tensor)[1].untyped_storage().nbytes() // divisor
                _, payload, ledger = self._encode(tensor, limit_bytes=limit_bytes)
                if payload is not None:
                    # What the payload owns, and the shared lists it made, which the ledger knows.
                    assert payload.num_bytes + ledger.read()[0] <= limit_bytes, (tensor.shape, tensor.dtype)

    def test_law_1_gradients_through_a_store_are_equal(self) -> None:
        store = SavedTensorStore(uniquify=[Forced(self.codec())], min_bytes=0)
        for tensor in awkward_tensors():
            if tensor.is_floating_point():
                gradients = [_gradient(tensor, inside=each) for each in (None, store)]
                assert torch.equal(_as_bytes(gradients[0]), _as_bytes(gradients[1])), (
                    tensor.shape,
                    tensor.dtype,
                )

    def _encode(self, tensor: Tensor, *, limit_bytes: int) -> tuple[Block, Payload | None, Ledger]:
        layout, source = lift(tensor.clone())
        block, _ = block_of(source, layout, whole_storage=True)
        ledger = Ledger()
        return block, self.codec().encode(block, limit_bytes=limit_bytes, lists=IndexLists(ledger)), ledger


def _gradient(tensor: Tensor, *, inside: SavedTensorStore | None) -> Tensor:
    leaf = tensor.clone().requires_grad_()
    if inside is None:
        value = (leaf * leaf).exp().sum()
    else:
        with inside:
            value = (leaf * leaf).exp().sum()
    (gradient,) = torch.autograd.grad(value, leaf)
    return gradient


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
