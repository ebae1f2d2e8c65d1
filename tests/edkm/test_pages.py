"""Large results lie on huge pages where that can be had, and are ordinary tensors."""

import pytest
import torch

from edkm import pages
from edkm.pages import empty_like


@pytest.mark.parametrize("numel", [0, 1, (1 << 23) - 1, 1 << 23, (1 << 23) + 12_345])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_it_is_an_ordinary_tensor(numel: int, dtype: torch.dtype) -> None:
    made = empty_like(torch.empty(numel, dtype=dtype))
    assert (made.shape, made.dtype) == ((numel,), dtype)
    values = torch.randn(numel).to(dtype)
    assert torch.equal(made.copy_(values), values)


def test_it_is_contiguous_whatever_it_is_like() -> None:
    assert empty_like(torch.empty(3000, 3000).t()).is_contiguous()
    assert empty_like(torch.empty(3000, 3000, device="meta")).is_meta


def test_only_whole_huge_pages_inside_it_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(pages, "_madvise", lambda start, length, _: asked.append((start, length)))
    empty_like(torch.empty(1000))
    assert not asked
    made = empty_like(torch.empty(1 << 22))
    ((start, length),) = asked
    assert start % (1 << 21) == length % (1 << 21) == 0
    assert made.data_ptr() <= start
    assert start + length <= made.data_ptr() + made.nbytes
    assert length > made.nbytes - (1 << 22)


def test_where_nobody_can_be_asked_it_is_as_torch_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_madvise", None)
    assert empty_like(torch.empty(1 << 22)).numel() == 1 << 22
