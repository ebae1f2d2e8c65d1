"""What is kept by reference: parameters and their views, and whatever has no plain readable storage."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from offload import SavedTensorStore, StaleTensorError
from offload.layout import lift
from offload.select import Kind, is_window, kind_of
from tests.laws.settings import STORES, Around, bits, plain


class Wrapped(Tensor):
    """A subclass as users make them."""


class Keep(torch.autograd.Function):
    """Saves anything, and hands on in backward what came back."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, kept: Tensor, found: list[Tensor]
    ) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.found = found
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.found += ctx.saved_tensors
        return gradient, None, None


def sparse() -> Tensor:
    return torch.eye(50).to_sparse()


OPAQUE: Mapping[str, Callable[[], Tensor]] = {
    "sparse coo": sparse,
    "sparse csr": lambda: torch.eye(50).to_sparse_csr(),
    "meta": lambda: torch.empty(50, 50, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(5, 4)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(5, 4)], layout=torch.jagged),
    "mkldnn": lambda: torch.ones(50, 50).to_mkldnn(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(50, 50), 0.1, 0, torch.qint8),
    "subclass": lambda: torch.ones(50, 50).as_subclass(Wrapped),
}
PLAIN: Mapping[str, Callable[[], Tensor]] = {
    "tensor": lambda: torch.ones(50, 50),
    "empty": lambda: torch.empty(0, 3),
    "buffer": lambda: nn.Buffer(torch.ones(50, 50)),
    "shared memory": lambda: torch.ones(50, 50).share_memory_(),
    "numpy": lambda: torch.from_numpy(torch.ones(50, 50).numpy()),
    "view of a leaf": lambda: torch.ones(50, 50, requires_grad=True).t(),
}
PARAMETERS: Mapping[str, Callable[[nn.Parameter], Tensor]] = {
    "itself": lambda p: p,
    "transposed": lambda p: p.t(),
    "view of a view": lambda p: p[2:].t()[1:].unsqueeze(0),
    "expanded": lambda p: p.expand(3, *p.shape),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:.*quantized"),
]


@pytest.mark.parametrize("name", sorted(OPAQUE))
def test_what_has_no_plain_storage_is_opaque(name: str) -> None:
    assert kind_of(OPAQUE[name]()) is Kind.OPAQUE


# PyTorch's own functions take no strided nested tensor; the product of two below saves one.
@pytest.mark.parametrize("name", sorted(set(OPAQUE) - {"nested"}))
def test_what_has_no_plain_storage_is_kept_as_it_is(name: str) -> None:
    tensor, found = OPAQUE[name](), []
    for make in STORES.values():
        store = make()
        with store:
            output = Keep.apply(torch.zeros((), requires_grad=True), tensor, found)
        assert store.stats.num_by_stage == {"opaque": 1}
        output.backward()
        (back,) = found
        assert type(back) is type(tensor)
        assert back.layout == tensor.layout
        assert back.is_quantized == tensor.is_quantized
        assert (back.dtype, back.device) == (tensor.dtype, tensor.device)
        found.clear()
        assert store.stats.held_bytes == 0


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_what_has_plain_storage_is_plain(name: str) -> None:
    assert kind_of(PLAIN[name]()) is Kind.PLAIN


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_parameters_and_their_views_are_kept_by_reference(name: str) -> None:
    parameter, found = nn.Parameter(torch.ones(64, 64)), []
    assert kind_of(PARAMETERS[name](parameter)) is Kind.PARAMETER
    for make in STORES.values():
        store = make()
        with store:
            output = Keep.apply(torch.zeros((), requires_grad=True), PARAMETERS[name](parameter), found)
        stats = store.stats
        assert stats.num_by_stage == {"parameter": 1}
        assert (stats.saved_bytes, stats.storage_bytes, stats.held_bytes) == (0, 0, 0)
        output.backward()
        (back,) = found
        assert back.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
        assert bits(back) == bits(PARAMETERS[name](parameter))
        found.clear()


def sparse_product(around: Around) -> list[Tensor]:
    matrix = torch.eye(50).to_sparse().requires_grad_()
    x = torch.linspace(-1, 1, 150).view(50, 3).requires_grad_()
    with around:
        loss = (torch.sparse.mm(matrix, x) * x).sum()
    first, second = torch.autograd.grad(loss, [matrix, x])
    return [first.to_dense(), second]


def nested_product(around: Around) -> list[Tensor]:
    parts = [
        torch.linspace(0, 1, 12).view(3, 4).requires_grad_(),
        torch.linspace(1, 2, 20).view(5, 4).requires_grad_(),
    ]
    nested = torch.nested.as_nested_tensor(parts)
    with around:
        loss = torch.nested.to_padded_tensor(nested * nested, 0.0).square().sum()
    return list(torch.autograd.grad(loss, parts))


def subclass_product(around: Around) -> list[Tensor]:
    x = torch.linspace(-1, 1, 4096).requires_grad_()
    factor = torch.linspace(1, 2, 4096).as_subclass(Wrapped)
    with around:
        loss = (x * factor).exp().sum()
    return [torch.autograd.grad(loss, x)[0].as_subclass(Tensor)]


def tied_parameters(around: Around) -> list[Tensor]:
    weight = nn.Parameter(torch.linspace(-1, 1, 64 * 64).view(64, 64))
    x = torch.linspace(-1, 1, 64 * 9).view(9, 64).requires_grad_()
    with around:
        loss = ((x @ weight).relu() @ weight.t() * weight.detach()[:9]).square().sum()
    return list(torch.autograd.grad(loss, [x, weight]))


@pytest.mark.parametrize("build", [sparse_product, nested_product, subclass_product, tied_parameters])
@pytest.mark.parametrize("name", sorted(STORES))
def test_gradients_through_them_are_right(name: str, *, build: Callable[[Around], list[Tensor]]) -> None:
    assert [bits(each) for each in build(STORES[name]())] == [bits(each) for each in build(plain())]


@pytest.mark.parametrize("make", [sparse, OPAQUE["subclass"]], ids=["sparse", "subclass"])
def test_an_opaque_tensor_that_was_changed_is_refused(make: Callable[[], Tensor]) -> None:
    tensor = make()
    with SavedTensorStore(uniquify=True):
        output = Keep.apply(torch.zeros((), requires_grad=True), tensor, [])
    tensor.mul_(2)
    with pytest.raises(StaleTensorError, match=r"at version 1 and was saved at version 0"):
        output.backward()


def test_a_window_is_a_small_part_of_a_long_storage() -> None:
    few, many = (lift(torch.zeros(num_bytes, dtype=torch.uint8))[0] for num_bytes in (10, 1 << 19))
    assert is_window(few, storage_bytes=1 << 22)
    assert not is_window(many, storage_bytes=1 << 22)
    assert not is_window(few, storage_bytes=1 << 12), "a short storage is read at once"


def test_a_window_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch cut from a memory-mapped file must not make the store read the file."""
    from offload import settle

    def refuse(source: Tensor) -> bytes:
        raise AssertionError(f"{source.untyped_storage().nbytes()} bytes were read")

    monkeypatch.setattr(settle, "digest_of", refuse)
    long = torch.zeros(1 << 20)
    weight = torch.ones(64, requires_grad=True)
    with SavedTensorStore(uniquify=True) as store:
        output = weight * long[640:704]
    assert store.stats.num_by_stage == {"reference": 1}
    output.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(64))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, at the first dual
def test_forward_over_reverse_runs() -> None:
    """Zeros of forward-mode AD have a storage whose address cannot be asked for."""

    def product(around: Around) -> Tensor:
        torch.manual_seed(3)
        x, weight = torch.randn(2048, requires_grad=True), torch.randn(2048, requires_grad=True)
        with around, forward_ad.dual_level():
            y = forward_ad.make_dual(x, torch.ones(2048)) * weight * x.sin()
            forward_ad.unpack_dual(y).tangent.sum().backward()
        assert weight.grad is not None
        return weight.grad

    assert bits(product(SavedTensorStore(min_bytes=4096))) == bits(product(plain()))
