"""Law 1, transparent: gradients equal plain autograd's bit for bit, whatever the store and the codec."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from offload import SavedTensorStore
from offload.codecs.base import Codec
from tests.laws.graphs import GRAPHS, Built
from tests.laws.settings import CODECS, STORES, Around, bits, plain


def gradients(build: Callable[[], Built], *, around: Around, steps: int = 1) -> list[bytes]:
    """Return loss and gradients of `steps` steps from one seed, as bytes."""
    torch.manual_seed(5)
    seen: list[Tensor | None] = []
    for _ in range(steps):
        with around:
            loss, leaves = build()
        seen += [loss, *torch.autograd.grad(loss, leaves)]
    return [bits(tensor) for tensor in seen]


@pytest.mark.parametrize("name", sorted(GRAPHS))
def test_gradients_are_those_of_plain_autograd(name: str, *, store: SavedTensorStore) -> None:
    expected = gradients(GRAPHS[name], around=plain(), steps=2)
    assert expected == gradients(GRAPHS[name], around=plain(), steps=2), "the graph repeats itself"
    assert gradients(GRAPHS[name], around=store, steps=2) == expected


@pytest.mark.parametrize("name", sorted(GRAPHS))
def test_backward_inside_the_context_is_the_same(name: str, *, store: SavedTensorStore) -> None:
    def build() -> Built:
        loss, leaves = GRAPHS[name]()
        found = torch.autograd.grad(loss, leaves, retain_graph=True)
        return loss + sum((part.real.double().sum() for part in found), torch.zeros(())), leaves

    assert gradients(build, around=store) == gradients(build, around=plain())


def test_one_store_serves_all_graphs(store: SavedTensorStore) -> None:
    """What one graph left behind, addresses and contents included, is nothing to the next."""
    for build in GRAPHS.values():
        assert gradients(build, around=store) == gradients(build, around=plain()), build.__name__


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.complex128], ids=str)
def test_every_dtype_comes_back(dtype: torch.dtype, *, store: SavedTensorStore) -> None:
    def build() -> Built:
        few = torch.randint(-2, 3, (41, 8)).to(dtype).requires_grad_()
        many = torch.randn(41, 8).to(dtype).requires_grad_()
        return ((few * many) * few.clone().t().contiguous().t() * many.exp()).abs().sum(), [few, many]

    assert gradients(build, around=store) == gradients(build, around=plain())


class Keep(torch.autograd.Function):
    """Saves a tensor, whatever it is, and hands its bytes to a list in backward."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, kept: Tensor, seen: list[bytes]
    ) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        ctx.seen.append(bits(kept))
        return gradient, None, None


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16),
        *(torch.uint32, torch.uint64, torch.complex32, torch.float8_e4m3fn, torch.float8_e5m2),
    ],
    ids=str,
)
def test_dtypes_without_a_gradient_come_back(dtype: torch.dtype, *, store: SavedTensorStore) -> None:
    few = torch.randint(0, 2, (999, dtype.itemsize), dtype=torch.uint8)
    few = few.flatten().view(dtype) if dtype is not torch.bool else few.flatten().bool()
    rows = few[:24].repeat(20, 1)
    seen: list[bytes] = []
    x = torch.zeros(3, requires_grad=True)
    with store:
        y = Keep.apply(Keep.apply(Keep.apply(x, few, seen), rows.t(), seen), rows[3:, 5:], seen)
    y.sum().backward()
    assert seen == [bits(rows[3:, 5:]), bits(rows.t()), bits(few)]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_each_codec_encodes_some_graph(codec: Codec) -> None:
    """So that equal gradients above say something about each of them."""
    num_encoded: Counter[str] = Counter()
    for name in (f"forced {codec.name}", "forced", "uniquify"):
        store = STORES[name]()
        for build in GRAPHS.values():
            gradients(build, around=store)
            num_encoded.update(store.stats.num_by_stage)
    assert num_encoded[codec.name] > 0
