"""Float32 that bfloat16 holds: with and without the compiled pass, bit for bit."""

import numpy as np
import pytest
import torch
from torch import Tensor

from offload.codecs import cast
from offload.codecs.base import Block, Payload
from offload.codecs.cast import Cast
from offload.codecs.halves import upper_halves
from offload.codecs.index_list import IndexLists
from offload.ledger import Ledger

WAYS = pytest.mark.parametrize("is_compiled", [True, False] if upper_halves is not None else [False])


def encoded(x: Tensor, *, is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> Payload | None:
    if not is_compiled:
        monkeypatch.setattr(cast, "upper_halves", None)
    block = Block(x.view(torch.uint8), x.element_size(), 1)
    return Cast().encode(block, limit_bytes=x.nbytes, lists=IndexLists(Ledger()))


def patterns() -> Tensor:
    """Every bfloat16 there is as float32: both zeros, subnormals, infinities, all NaNs."""
    return (torch.arange(1 << 16, dtype=torch.int32) << 16)[torch.randperm(1 << 16)]


@WAYS
@pytest.mark.parametrize("num", [1, 4095, 4096, 4097, 1 << 16])
def test_every_pattern_comes_back(num: int, is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bits = patterns()[:num]
    if not is_compiled:  # torch's cast makes one NaN of all
        bits = bits[~bits.view(torch.float32).isnan()]
    payload = encoded(bits, is_compiled=is_compiled, monkeypatch=monkeypatch)
    assert payload is not None
    assert payload.num_bytes == 2 * bits.numel()
    assert payload.decode().equal(bits.view(torch.uint8))


@WAYS
@pytest.mark.parametrize("place", [0, 4095, 4096, 9999])
@pytest.mark.parametrize("lower", [1, 0x8000, 0xFFFF])
def test_one_bit_more_is_no_bfloat16(
    place: int, lower: int, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = patterns()[:10_000].clamp(0, 0x7F00_0000)
    bits[place] |= lower
    payload = encoded(bits, is_compiled=is_compiled, monkeypatch=monkeypatch)
    # float16 may do, of a few small numbers; not of these
    assert payload is None or payload.decode().equal(bits.view(torch.uint8))
    assert payload is None


@pytest.mark.parametrize("start", [1, 2, 3])
def test_at_an_odd_address_c_does_not_read(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: int) -> bool:
        raise AssertionError("C was to read scalars that lie across their places")

    monkeypatch.setattr(cast, "upper_halves", read)
    bits = torch.randn(3000).bfloat16().float()
    memory = np.zeros(bits.nbytes + 4, dtype=np.uint8)
    memory[start : start + bits.nbytes] = bits.view(torch.uint8).numpy()
    x = torch.from_numpy(np.frombuffer(memory.data, dtype=np.float32, count=3000, offset=start))
    assert x.data_ptr() % 4 == (memory.ctypes.data + start) % 4 != 0
    payload = Cast().encode(
        Block(x.view(torch.uint8), 4, 1), limit_bytes=x.nbytes, lists=IndexLists(Ledger())
    )
    assert payload is not None
    assert payload.decode().equal(bits.view(torch.uint8))


def test_a_default_device_is_not_where_the_smaller_scalars_go() -> None:
    bits = torch.randn(3000).bfloat16().float()
    with torch.device("meta"):
        payload = Cast().encode(
            Block(bits.view(torch.uint8), 4, 1), limit_bytes=bits.nbytes, lists=IndexLists(Ledger())
        )
    assert payload is not None
    assert payload.decode().equal(bits.view(torch.uint8))
