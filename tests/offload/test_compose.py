"""A store among its neighbours: checkpoint, autocast, compile, other hooks, functional transforms."""

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from offload import SavedTensorStore
from tests.laws.settings import STORES, Around, bits, no_gc, plain

IMPOSSIBLE: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "torch.func.grad": lambda f, x: torch.func.grad(f)(x),
    "torch.func.vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones(())),
    "torch.func.jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "torch.func.hessian": lambda f, x: torch.func.hessian(f)(x),
}


def block(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Dropout(0.2), nn.Linear(48, 16), nn.LayerNorm(16))


def gradients(
    forward: Callable[[nn.Module, Tensor], Tensor], *, around: Around, inside: bool = False
) -> list[bytes]:
    """Run two steps and return all gradients; backward in the context or behind it."""
    model, torch_inputs = block(1), torch.linspace(-2, 2, 90 * 16).view(90, 16)
    x = torch_inputs.clone().requires_grad_()
    for _ in range(2):
        with around:
            loss = forward(model, x).float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
    return [bits(each.grad) for each in (x, *model.parameters())]


def reentrant(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x.sin(), use_reentrant=True).exp()


def non_reentrant(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x.sin(), use_reentrant=False).exp()


def by_segment(model: nn.Module, x: Tensor) -> Tensor:
    for number in range(len(model)):
        x = checkpoint(model[number], x, use_reentrant=number % 2 == 0)
    return x


def autocast(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(x) * model(x.flip(0)).sigmoid()


def autocast_checkpoint(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return checkpoint(model, x, use_reentrant=False) + model(x)


def vmapped(model: nn.Module, x: Tensor) -> Tensor:
    return torch.vmap(lambda row: (model[0](row) * row.sum()).tanh())(x)


def parallel_pieces(model: nn.Module, x: Tensor) -> Tensor:
    with saved_tensors_hooks(lambda each: each.clone(), lambda each: each):
        y = model(x)
    return y * x.exp()


def moved(model: nn.Module, x: Tensor) -> Tensor:
    with save_on_cpu():
        return model(x.sin()) * x


FORWARDS = (
    reentrant,
    non_reentrant,
    by_segment,
    autocast,
    autocast_checkpoint,
    vmapped,
    parallel_pieces,
    moved,
)


@pytest.mark.parametrize("inside", [False, True], ids=["backward behind", "backward inside"])
@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
@pytest.mark.parametrize("name", sorted(STORES))
def test_gradients_are_equal_and_nothing_is_left(
    name: str, *, forward: Callable[[nn.Module, Tensor], Tensor], inside: bool
) -> None:
    store = STORES[name]()
    with no_gc():
        assert gradients(forward, around=store, inside=inside) == gradients(
            forward, around=plain(), inside=inside
        )
        assert store.stats.held_bytes == 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_store_inside_a_checkpointed_function_is_right(use_reentrant: bool) -> None:
    """It defeats the checkpoint, which wants to save nothing; gradients stay."""
    store = SavedTensorStore(uniquify=True, min_bytes=0)

    def forward(model: nn.Module, x: Tensor, *, around: Around) -> Tensor:
        def part(x: Tensor) -> Tensor:
            with around:
                return model(x)

        return checkpoint(part, x, use_reentrant=use_reentrant)

    with no_gc():
        under = gradients(lambda model, x: forward(model, x, around=store), around=plain())
        assert under == gradients(lambda model, x: forward(model, x, around=plain()), around=plain())
        assert store.stats.held_bytes == 0


def test_a_checkpoint_leaves_the_store_its_inputs_alone() -> None:
    x = torch.randn(90, 16, requires_grad=True)
    with SavedTensorStore(min_bytes=4096) as store:
        checkpoint(block(1), x, use_reentrant=False)
    assert store.stats.saved_bytes == x.nbytes


def test_the_innermost_hooks_win() -> None:
    """PyTorch's rule (Law 9): of two stores the inner one saves."""
    outer, inner = SavedTensorStore(min_bytes=0), SavedTensorStore(min_bytes=0)
    x = torch.randn(2000, requires_grad=True)
    with outer:
        with inner:
            y = x.exp()
        z = y.sin()
    assert (outer.stats.num_saved, inner.stats.num_saved) == (1, 1)
    z.sum().backward()
    assert torch.equal(x.grad, (x.exp().cos() * x.exp()).detach())


def test_a_store_entered_twice_is_one_store() -> None:
    store = SavedTensorStore(min_bytes=0)
    x = torch.randn(2000, requires_grad=True)
    with store:
        y = x.exp()
        with store as again:
            z = x.sin() * y
        w = z.tanh()
    assert again is store
    stats = store.stats
    assert stats.num_saved == 5
    w.sum().backward()
    assert store.stats.held_bytes == 0
    assert torch.allclose(
        x.grad, torch.autograd.functional.jacobian(lambda x: (x.sin() * x.exp()).tanh().sum(), x.detach())
    )


def test_counts_start_anew_at_the_outermost_enter_alone() -> None:
    store, x = SavedTensorStore(min_bytes=0), torch.randn(2000, requires_grad=True)
    for _ in range(3):
        with store:
            x.exp()
            with store:
                x.sin()
            x.cos()
        assert store.stats.num_saved == 3
        assert store.stats.peak_held_bytes <= 2 * x.nbytes


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", sorted(IMPOSSIBLE))
def test_what_hooks_cannot_do_is_said_by_torch_and_by_the_page(name: str, *, root: Path) -> None:
    page = " ".join((root / "docs" / "compose.md").read_text().split())
    with pytest.raises(RuntimeError) as refused, SavedTensorStore():
        IMPOSSIBLE[name](lambda x: (x * x).exp().sum(), torch.ones(3))
    assert " ".join(str(refused.value).split()) in page
    assert f"`{name}`" in page


def test_an_enter_that_torch_refuses_leaves_the_store_as_it_was() -> None:
    store, x = SavedTensorStore(min_bytes=0), torch.randn(2000, requires_grad=True)

    def inside(x: Tensor) -> Tensor:
        with store:
            return x.exp().sum()

    with pytest.raises(RuntimeError, match="saved tensor hooks"):
        torch.func.grad(inside)(x.detach())
    for _ in range(2):
        with store:
            x.exp()
        assert store.stats.num_saved == 1


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", sorted(STORES))
def test_the_way_out_works_under_a_store(name: str) -> None:
    """`torch.autograd.functional` and `grad` with `create_graph` do what the transforms cannot."""

    def function(x: Tensor) -> Tensor:
        return (x * x).exp().sum() * x.sin().sum()

    x = torch.linspace(-1, 1, 30)
    store = STORES[name]()
    with store:
        hessian = torch.autograd.functional.hessian(function, x)
        jacobian = torch.autograd.functional.jacobian(lambda x: x.exp() * x.flip(0), x, vectorize=True)
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
        rows = torch.stack([torch.autograd.grad(each, leaf, retain_graph=True)[0] for each in first])
    assert torch.equal(hessian, torch.autograd.functional.hessian(function, x))
    assert torch.allclose(hessian, torch.func.hessian(function)(x), atol=1e-4)
    assert torch.allclose(jacobian, torch.func.jacrev(lambda x: x.exp() * x.flip(0))(x), atol=1e-4)
    assert torch.equal(rows, hessian)


@contextmanager
def compiled(module: nn.Module, *, backend: str) -> Iterator[Callable[[Tensor], Tensor]]:
    """Compile a module, or skip."""
    if backend == "inductor" and shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("torch.compile's own backend needs a C++ compiler")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what importing the compiler itself warns of
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        yield torch.compile(module, fullgraph=True, backend=backend)
        torch._dynamo.reset()


class Small(nn.Module):
    """Few operators: compiling them is all the time this test takes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 48))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x * self.weight).exp().sum()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_module_inside_the_context_is_right(backend: str) -> None:
    x, module = torch.linspace(-1, 1, 96 * 48).view(96, 48), Small()
    stores = SavedTensorStore(uniquify=True), SavedTensorStore(dedupe=False), STORES["forced"]()
    with compiled(module, backend=backend) as run, no_gc():
        found = []
        for around in (plain(), *stores):
            leaf = x.clone().requires_grad_()
            with around:
                loss = run(leaf)
            assert around not in stores or around.stats.num_saved > 0
            found.append([bits(each) for each in torch.autograd.grad(loss, [leaf, module.weight])])
            del loss
        assert found[1:] == found[:1] * 3
        assert [store.stats.held_bytes for store in stores] == [0] * 3
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "no recompile"
