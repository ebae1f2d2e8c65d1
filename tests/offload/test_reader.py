"""Who only reads a saved tensor is lent the store's bytes; who may write to it gets a copy."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from offload import SavedTensorStore, fast, handle, reader
from offload.part import Part


@pytest.fixture(autouse=True, params=["compiled", "python"])
def teller(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads is told by C, where that was compiled, and by Python."""
    if request.param == "python":
        monkeypatch.setattr(handle, "only_reads", reader.tell)
    elif fast.Reader is None:
        pytest.skip("offload/_reader.c was not compiled: no C compiler")


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the copies that readers get."""
    made: list[int] = []
    read_own = Part.read_own

    def counted(part: Part) -> Tensor:
        made.append(1)
        return read_own(part)

    monkeypatch.setattr(Part, "read_own", counted)
    return made


class Writes(torch.autograd.Function):
    """Writes to what it saved in backward, behind the counter, as some kernels do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x * factor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        factor.data.mul_(gradient)
        return factor.clone(), None


def equal_products(store: SavedTensorStore, weight: Tensor) -> Tensor:
    """Save three equal inputs of a matrix product, each on a storage of its own."""
    x = torch.linspace(-1, 1, 256 * 64).view(256, 64)
    with store:
        return x.clone() @ weight + x.clone() @ weight + x.clone() @ weight


def test_products_of_equal_inputs_copy_none(copies: list[int]) -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    store = SavedTensorStore(min_bytes=4096)
    y = equal_products(store, weight)
    assert store.stats.num_by_stage["content"] == 2
    y.square().sum().backward()
    assert not copies
    x = torch.linspace(-1, 1, 256 * 64).view(256, 64)
    twin = weight.detach().requires_grad_()
    (x @ twin + x.clone() @ twin + x.clone() @ twin).square().sum().backward()
    assert torch.equal(weight.grad, twin.grad)  # type: ignore[arg-type]


def test_who_looks_from_outside_gets_a_copy(copies: list[int]) -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    y = equal_products(SavedTensorStore(min_bytes=4096), weight)
    y.sum().backward(retain_graph=True)
    before, weight.grad = weight.grad, None
    node = y.grad_fn.next_functions[1][0]  # type: ignore[union-attr]
    node._saved_self.zero_()  # type: ignore[union-attr]
    assert copies
    y.sum().backward()
    assert torch.equal(weight.grad, before)  # type: ignore[arg-type]


def test_a_backward_that_writes_to_what_it_saved_spoils_no_equal_tensor(copies: list[int]) -> None:
    x = torch.randn(64, 64, requires_grad=True)
    factor = torch.randn(64, 64)
    store = SavedTensorStore(min_bytes=4096)
    with store:
        y = Writes.apply(x, factor.clone()) + x * factor.clone() + Writes.apply(x, factor.clone())
    assert store.stats.num_by_stage == {"reference": 1, "content": 2}
    y.sum().backward()
    assert copies
    torch.testing.assert_close(x.grad, 3 * factor, rtol=0, atol=0)


def test_with_a_graph_of_the_backward_readers_get_copies(copies: list[int]) -> None:
    x = torch.randn(64, 64, requires_grad=True)
    factor = torch.randn(64, 64)
    with SavedTensorStore(min_bytes=4096):
        y = x.square() * factor.clone() + x * factor.clone() + x * factor.clone()
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert copies
    gradient.sum().backward()
    torch.testing.assert_close(x.grad, 2 * factor, rtol=0, atol=0)


class Looks(TorchDispatchMode):
    """Writes to what another node saved while a node runs."""

    def __init__(self, node: Any) -> None:
        super().__init__()
        self.node = node

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        node, self.node = self.node, None
        if node is not None:
            node._saved_self.data.zero_()
        return op(*args, **(kwargs or {}))


def test_a_mode_that_looks_while_a_product_runs_gets_a_copy() -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    y = equal_products(SavedTensorStore(min_bytes=4096), weight)
    y.sum().backward(retain_graph=True)
    before, weight.grad = weight.grad, None
    loss = y.sum()
    with Looks(y.grad_fn.next_functions[1][0]):  # type: ignore[union-attr]
        loss.backward()
    assert torch.equal(weight.grad, before)  # type: ignore[arg-type]


def test_views_of_what_is_lent_come_back_as_they_were() -> None:
    """Equal storages, saved with other shapes and strides than the first."""
    x = torch.linspace(-1, 1, 64 * 64).view(64, 64)
    weights = [torch.randn(64, 64, requires_grad=True) for _ in range(4)]
    store = SavedTensorStore(min_bytes=4096)

    def loss() -> Tensor:
        views = [x.clone(), x.clone(), x.clone().t(), x.clone()[:32]]
        return (
            sum(view @ weight for view, weight in zip(views[:3], weights, strict=False)).square().sum()
            + (  # type: ignore[union-attr]
                views[3] @ weights[3]
            ).sum()
        )

    for _ in range(3):
        wanted = torch.autograd.grad(loss(), weights)
        with store:
            saved = loss()
        assert store.stats.num_by_stage["content"] == 3
        for _ in range(2):
            found = torch.autograd.grad(saved, weights, retain_graph=True)
            assert all(map(torch.equal, found, wanted))
        del saved
        assert store.stats.held_bytes == 0


class Zeroes(TorchDispatchMode):
    """Writes to the first operand of each product, which is what a node saved."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        if op is torch.ops.aten.mm.default:
            for each in args:
                each.zero_()
        return out


def test_a_mode_that_writes_to_operands_writes_to_no_equal_save() -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    y = equal_products(SavedTensorStore(min_bytes=4096), weight)
    with Zeroes():
        y.backward(torch.ones_like(y), retain_graph=True)
    twin = weight.detach().requires_grad_()
    x = torch.linspace(-1, 1, 256 * 64).view(256, 64)
    z = x.clone() @ twin + x.clone() @ twin + x.clone() @ twin
    with Zeroes():
        z.backward(torch.ones_like(z))
    assert torch.equal(weight.grad, twin.grad)  # type: ignore[arg-type]
