"""A 16-bit weight by its bit patterns: counted, and summed over, compiled and in pieces."""

import pytest
import torch

from edkm import compiled, patterns
from edkm.compiled import Compiled
from edkm.patterns import NUM_PATTERNS, pattern_counts, pattern_sums

NARROW = [torch.float16, torch.bfloat16]
NUM_WEIGHTS = (1 << 22) + 3
"""Enough to be worth compiling for, and no multiple of anything."""


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_COUNTS", Compiled(patterns._counts, in_order=True))
    monkeypatch.setattr(patterns, "_SUMS", Compiled(patterns._sums, in_order=True))


def bits() -> torch.Tensor:
    """Return patterns of all kinds: NaN, infinities, both zeros."""
    return torch.randint(-(1 << 15), 1 << 15, (NUM_WEIGHTS,), dtype=torch.int16)


def expected_counts(keys: torch.Tensor) -> torch.Tensor:
    return torch.bincount(keys.int() & (NUM_PATTERNS - 1), minlength=NUM_PATTERNS)


def require_compiled(loop: Compiled) -> None:
    if not loop._works:
        pytest.skip("torch.compile needs a C++ compiler")
    assert loop._function is not None


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_compiled_count_is_the_count(dtype: torch.dtype) -> None:
    keys = bits()
    keys[: 1 << 20] = 7  # one after the other
    counts = pattern_counts(keys.view(dtype), dtype)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, expected_counts(keys))
    require_compiled(patterns._COUNTS)


@pytest.mark.parametrize("terms_dtype", [*NARROW, torch.float32, torch.float64], ids=str)
def test_compiled_sums_are_those_of_pieces(terms_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, terms = bits().view(torch.bfloat16), torch.randn(NUM_WEIGHTS).to(terms_dtype)
    terms[5], terms[1 << 21] = float("nan"), float("inf")
    in_one = pattern_sums(weight, torch.bfloat16, terms=terms)
    monkeypatch.setattr(compiled, "_LEAST_COMPILED", NUM_WEIGHTS + 1)
    plain = pattern_sums(weight, torch.bfloat16, terms=terms)
    assert in_one.dtype == torch.float64
    torch.testing.assert_close(in_one, plain, rtol=1e-13, atol=1e-13, equal_nan=True)
    require_compiled(patterns._SUMS)


def test_a_default_device_has_no_part_in_it() -> None:
    keys = bits()
    with torch.device("meta"):
        counts = pattern_counts(keys.view(torch.bfloat16), torch.bfloat16)
        sums = pattern_sums(keys.view(torch.bfloat16), torch.bfloat16, terms=keys)
    assert torch.equal(counts, expected_counts(keys))
    assert sums.device == keys.device


def test_compiled_sums_are_the_same_from_run_to_run() -> None:
    weight, terms = bits().view(torch.float16), torch.randn(NUM_WEIGHTS)
    first, second = (pattern_sums(weight, torch.float16, terms=terms) for _ in range(2))
    assert torch.equal(first, second)


def test_sums_that_fail_half_way_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_to_fail(*_: object, **__: object) -> object:
        def fail(_bits: torch.Tensor, *others: torch.Tensor) -> None:
            others[-1].fill_(3)
            raise RuntimeError("half way")

        return fail

    monkeypatch.setattr(torch, "compile", compile_to_fail)
    keys, terms = bits(), torch.ones(NUM_WEIGHTS)
    weight = keys.view(torch.bfloat16)
    assert torch.equal(pattern_counts(weight, torch.bfloat16), expected_counts(keys))
    sums = pattern_sums(weight, torch.bfloat16, terms=terms)
    assert torch.equal(sums, expected_counts(keys).double())


def test_where_adding_would_not_be_compiled_it_goes_in_pieces() -> None:
    """Deterministic algorithms call the operator, which makes an index of 8 bytes a weight."""
    keys = bits()
    torch.use_deterministic_algorithms(True)
    try:
        counts = pattern_counts(keys.view(torch.bfloat16), torch.bfloat16)
        sums = pattern_sums(keys.view(torch.bfloat16), torch.bfloat16, terms=torch.ones(NUM_WEIGHTS))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(counts, expected_counts(keys))
    assert torch.equal(sums, counts.double())
    assert patterns._COUNTS._function is None
    assert patterns._SUMS._function is None
