"""Views come back with exact shape, strides, offset, dtype, conj and neg bits, and share one payload."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from offload import SavedTensorStore
from offload.layout import Layout, block_of, lay, lay_bytes, lift
from tests.laws.settings import STORES

VIEWS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda x: x,
    "transposed": lambda x: x.t(),
    "slice": lambda x: x[3:-2, 1::3],
    "column": lambda x: x[:, 5],
    "chunk": lambda x: x.chunk(3, dim=1)[1],
    "expanded": lambda x: x[2].expand(7, -1),
    "expanded scalar": lambda x: x[0, 0].expand(2, 3),
    "flat": lambda x: x.view(-1),
    "gaps and an expanded dimension": lambda x: x[:, ::16].expand(3, -1, -1),
    "gaps that overlap": lambda x: x.as_strided((3, 3), (200, 200), 4),
    "diagonal": lambda x: x.diagonal(1),
    "unfolded": lambda x: x.unfold(1, 4, 2),
    "permuted": lambda x: x.view(6, 8, -1).permute(2, 0, 1),
    "overlapping": lambda x: x.as_strided((5, 5), (2, 1), 7),
    "0-d": lambda x: x[1, 1],
    "empty": lambda x: x[4:4],
    "strides of one": lambda x: x.as_strided((1, 3, 1), (77, 2, 5), 1),
    "patterns": lambda x: x.view(torch.int32),
    "bytes": lambda x: x.view(torch.uint8)[:, 2:-1],
    "halves": lambda x: x.view(torch.bfloat16)[1:, ::2],
    "doubles": lambda x: x.view(torch.float64).t(),
    "complex": lambda x: x.view(torch.complex64),
    "conj": lambda x: x.view(torch.complex64).conj(),
    "mH": lambda x: x.view(torch.complex64)[1:].mH,
    "imaginary of conj": lambda x: x.view(torch.complex64).conj().imag,
    "neg": lambda x: torch._neg_view(x)[1:, 2:],
    "conj of neg": lambda x: torch._neg_view(x.view(torch.complex64)).conj(),
    "real": lambda x: torch.view_as_real(x.view(torch.complex64))[..., 1],
}
CONTENTS: Mapping[str, Callable[[], Tensor]] = {
    "many": lambda: torch.randn(48, 32),
    "few": lambda: torch.randn(48, 32).sign(),
}


class Seen(NamedTuple):
    """All that backward can tell of a tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    is_conj: bool
    is_neg: bool
    contents: bytes


def seen(tensor: Tensor) -> Seen:
    flat = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(-1).view(torch.uint8)
    return Seen(
        *(tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype),
        *(tensor.is_conj(), tensor.is_neg(), flat.numpy().tobytes()),
    )


class Keep(torch.autograd.Function):
    """Saves tensors of any kind, and notes in backward what came back."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, found: list[Seen], *kept: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*kept)
        ctx.found = found
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.found += [seen(tensor) for tensor in ctx.saved_tensors]
        return gradient, None, *(None for _ in ctx.saved_tensors)


def keep(store: SavedTensorStore, *tensors: Tensor) -> tuple[Tensor, list[Seen]]:
    """Save the tensors and return the output, and the list that backward fills."""
    found: list[Seen] = []
    with store:
        output = Keep.apply(torch.zeros((), requires_grad=True), found, *tensors)
    return output, found


@pytest.mark.parametrize("name", sorted(STORES))
@pytest.mark.parametrize("values", sorted(CONTENTS))
def test_each_view_comes_back_as_it_lay(values: str, *, name: str) -> None:
    for view in VIEWS.values():
        x = CONTENTS[values]()
        output, found = keep(STORES[name](), view(x))
        expected = seen(view(x))
        output.backward()
        if "copies" in name:  # the copy begins where the view does
            found, expected = [each._replace(offset=0) for each in found], expected._replace(offset=0)
        assert found == [expected]


@pytest.mark.parametrize("name", sorted(name for name in STORES if "copies" not in name))
@pytest.mark.parametrize("values", sorted(CONTENTS))
def test_all_views_of_a_storage_share_one_payload(values: str, *, name: str) -> None:
    x = CONTENTS[values]()
    one, store = STORES[name](), STORES[name]()
    kept = keep(one, x)
    views = [view(x) for view in VIEWS.values()]
    output, found = keep(store, *views)
    stats = store.stats
    assert stats.held_bytes == one.stats.held_bytes
    assert stats.storage_bytes == x.nbytes
    assert stats.num_saved == len(VIEWS)
    assert stats.saved_bytes == sum(view.nbytes for view in views)
    output.backward()
    assert found == [seen(view) for view in views]
    del kept


@pytest.mark.parametrize("name", sorted(STORES))
def test_views_of_a_storage_that_is_longer_than_them(name: str) -> None:
    """A batch cut from a long storage, an odd offset, and a storage whose bytes no item divides."""
    long = torch.randn(5000)
    odd = torch.empty(0).set_(torch.arange(4099, dtype=torch.uint8).untyped_storage(), 1, (1000,), (1,))
    tensors = [long[7:4007].view(40, 100).t(), long[1:4001].view(2000, 2), long[4990:], odd, odd[:0]]
    output, found = keep(STORES[name](), *tensors)
    expected = [seen(tensor) for tensor in tensors]
    output.backward()
    assert [each._replace(offset=0) for each in found] == [each._replace(offset=0) for each in expected]


def test_lift_and_lay_are_each_others_reverse() -> None:
    x = torch.randn(48, 32)
    for view in VIEWS.values():
        layout, alias = lift(view(x))
        assert not alias.is_conj()
        assert not alias.is_neg()
        assert not alias.requires_grad
        assert seen(lay(layout, alias)) == seen(view(x))
        assert seen(lay_bytes(layout, x.clone().view(-1).view(torch.uint8), start=0)) == seen(view(x))


def test_lift_keeps_the_version_counter_and_leaves_the_graph() -> None:
    hidden = torch.randn(5, requires_grad=True) * 2
    _, alias = lift(hidden.detach())
    with torch.no_grad():
        hidden.add_(1)
    assert alias._version == hidden._version == 1
    assert alias.grad_fn is None


@pytest.mark.parametrize(
    ("shape", "stride", "offset", "span"),
    [
        ((3, 4), (4, 1), 0, (0, 48)),
        ((3, 4), (1, 3), 5, (20, 68)),
        ((2, 3), (0, 2), 1, (4, 24)),
        ((), (), 3, (12, 16)),
        ((0, 7), (7, 1), 2, (8, 8)),
        ((1, 1), (99, 99), 0, (0, 4)),
    ],
)
def test_span_is_what_the_tensor_reaches(
    shape: tuple[int, ...], *, stride: tuple[int, ...], offset: int, span: tuple[int, int]
) -> None:
    layout = Layout(torch.Size(shape), stride, offset, torch.float32, conj=False, neg=False)
    assert layout.span() == span
    assert layout.span_bytes() == span[1] - span[0]


def test_a_block_is_the_storage_or_the_part_that_is_reached() -> None:
    x = torch.arange(100, dtype=torch.int16)
    layout, alias = lift(x[10:40].view(5, 6))
    whole, start = block_of(alias, layout, whole_storage=True)
    assert (whole.num_bytes, whole.item_bytes, whole.row_items, start) == (200, 2, 1, 0)
    part, start = block_of(alias, layout, whole_storage=False)
    assert (part.num_bytes, part.row_bytes, start) == (60, 12, 20)
    assert torch.equal(part.flat.view(torch.int16), x[10:40])


@pytest.mark.parametrize(
    ("view", "row_items"),
    [
        (lambda x: x, 32),
        (lambda x: x.t(), 32),
        (lambda x: x.view(6, 8, 32).transpose(0, 1), 32),
        (lambda x: x.view(-1), 48 * 32),
        (lambda x: x[:, :31], 1),
        (lambda x: x.view(1, 48, 32, 1), 32),
    ],
)
def test_rows_lie_along_the_dimension_of_stride_one(
    view: Callable[[Tensor], Tensor], *, row_items: int
) -> None:
    layout, alias = lift(view(torch.randn(48, 32)))
    assert block_of(alias, layout, whole_storage=True)[0].row_items == row_items
