"""Look-ups over a 16-bit weight: compiled and in pieces, to the same bits."""

import warnings

import pytest
import torch

from edkm import compiled, fused_dkm, fused_lookup
from edkm.compiled import Compiled
from edkm.fused_lookup import look_up, look_up_line

NARROW = [torch.float16, torch.bfloat16]
NUM_WEIGHTS = (1 << 22) + 3
"""Enough to be worth compiling for, and no multiple of anything."""


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_lookup, "_ENTRIES", Compiled(fused_lookup._entries))
    monkeypatch.setattr(fused_lookup, "_LINES", Compiled(fused_lookup._lines))


def both_ways(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> list[list[torch.Tensor]]:
    """Look up compiled, then in pieces: entries and lines."""
    bits = torch.randint(-(1 << 15), 1 << 15, (NUM_WEIGHTS,), dtype=torch.int16)
    weight, at = bits.view(dtype), torch.randn(NUM_WEIGHTS).to(dtype)  # NaN, infinities, both zeros
    at[::1001] = torch.tensor(float("nan"))
    table, slope, height = torch.randn(1 << 16).to(dtype), *torch.randn(2, 1 << 16)
    ways = []
    for _ in range(2):
        found, line = torch.empty(2, NUM_WEIGHTS, dtype=dtype)
        look_up(weight, table, dtype=dtype, into=found)
        look_up_line(weight, at, slope=slope, height=height, dtype=dtype, into=line)
        ways.append([found, line])
        monkeypatch.setattr(compiled, "_LEAST_COMPILED", NUM_WEIGHTS + 1)
    return ways


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_compiled_look_up_gives_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    in_one, plain = both_ways(dtype, monkeypatch)
    if not fused_lookup._ENTRIES._works:
        pytest.skip("torch.compile needs a C++ compiler")
    for mine, theirs in zip(in_one, plain, strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
        assert torch.equal(mine.nan_to_num().view(torch.int16), theirs.nan_to_num().view(torch.int16))


def refuse(*_: object, **__: object) -> None:
    raise RuntimeError("no compiler")


def give_back(kernel: object, **_: object) -> object:
    return kernel


def fail_later(kernel: object, **_: object) -> object:
    calls = []

    def call(*arguments: torch.Tensor) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            refuse()

    return call


@pytest.mark.parametrize("compiler", [refuse, give_back, fail_later])
def test_where_it_is_not_compiled_it_goes_in_pieces(
    compiler: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no compiler, torch.compile is turned off, or it fails when it is called."""
    monkeypatch.setattr(torch, "compile", compiler)
    in_one, plain = both_ways(torch.bfloat16, monkeypatch)
    for mine, theirs in zip(in_one, plain, strict=True):
        assert torch.equal(mine.view(torch.int16), theirs.view(torch.int16))
    assert not fused_lookup._ENTRIES.run(*in_one), "it is not tried again"


def test_small_weights_are_not_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Compiled, "run", fail)
    weight = torch.randn(300, 400).bfloat16().requires_grad_()
    clustered, _ = fused_dkm(weight, torch.linspace(-1, 1, 8), temperature=0.01, iterations=1)
    clustered.sum().backward()
    assert weight.grad is not None


def test_compiling_says_nothing_and_works_inside_autocast() -> None:
    weight = torch.randn(2049, 2048).bfloat16().requires_grad_()
    centroids = torch.linspace(-1, 1, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, _ = fused_dkm(weight, centroids, temperature=0.01, iterations=1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside, _ = fused_dkm(weight, centroids, temperature=0.01, iterations=1)
    assert torch.equal(plain, inside)
