"""Maps that are a function of a saved 16-bit tensor: what is held of them, and what happens to the key."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from edkm.dkm import dkm
from edkm.fused import fused_dkm
from offload import SavedTensorStore, StaleTensorError
from tests.laws.settings import bits

NUM_ROWS, NUM_COLUMNS = 256, 128
NUM_VALUES = 2000


class Keep(torch.autograd.Function):
    """Saves tensors, and gives back in backward the last of them as it was read."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, weight: Tensor, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        return weight.expand(kept[-1].shape).clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *others, last = ctx.saved_tensors
        Keep.read = last
        return (gradient.sum(), *[None] * (1 + len(others)))

    read: Tensor


def parameter(dtype: torch.dtype = torch.bfloat16) -> nn.Parameter:
    """Return a weight of at most NUM_VALUES values, special ones among them."""
    values = (torch.randn(NUM_VALUES) * 0.05)[torch.randint(NUM_VALUES, (NUM_ROWS, NUM_COLUMNS))].to(dtype)
    values.view(-1)[:4] = torch.tensor([0.0, -0.0, float("nan"), float("inf")]).to(dtype)
    return nn.Parameter(values)


def rows_of(key: Tensor, *, num_columns: int = 8) -> Tensor:
    """Return a map `[N, num_columns]`, row by row of random values, and special ones, for each pattern."""
    table = torch.randn(1 << 16, num_columns).to(key.dtype)
    table[0] = -0.0
    table[1 << 15, 0] = float("nan")
    return table[key.detach().reshape(-1).view(torch.uint16).int()]


def stages(store: SavedTensorStore) -> dict[str, int]:
    return dict(store.stats.num_by_stage)


def check(key: Tensor, map_: Tensor, *, is_table: bool = True, kept: int = 0) -> None:
    """Save both, see what became of the map, and that it comes back bit for bit."""
    store, weight = SavedTensorStore(uniquify=True, min_bytes=0), torch.zeros((), requires_grad=True)
    with store:
        output = Keep.apply(weight, key, map_.clone())
    assert ("tensor-keyed" in stages(store)) == is_table, stages(store)
    if is_table:
        num_values = len(key.detach().reshape(-1).view(torch.int16).unique())
        assert store.stats.held_bytes <= kept + num_values * (map_.nbytes // key.numel() + 6) + 1024
    output.sum().backward()
    assert bits(Keep.read) == bits(map_)
    assert Keep.read.stride() == map_.clone().stride()
    del output
    assert store.stats.held_bytes == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_and_scalars_by_a_parameter_cost_a_table(dtype: torch.dtype) -> None:
    """Maps in its own dtype and in float32, and the clustered weight; NaN and -0.0 by bits."""
    weight = parameter(dtype)
    rows = rows_of(weight)
    for map_ in (rows, rows.float(), rows[:, 0].contiguous().view_as(weight)):
        check(weight, map_)


def test_the_order_of_a_key_is_that_of_its_storage_or_of_its_dims() -> None:
    weight = parameter()
    check(weight.t(), rows_of(weight))  # a linear saves its weight transposed
    check(weight.t(), rows_of(weight.t()))
    check(weight[:, 3:61], rows_of(weight[:, 3:61]))
    check(weight.view(8, 32, 128).permute(1, 2, 0), rows_of(weight.view(8, 32, 128).permute(1, 2, 0)))
    check(weight[0].expand(64, NUM_COLUMNS), rows_of(weight[0].expand(64, NUM_COLUMNS)))
    wide = rows_of(weight)[:, 0].contiguous().view_as(weight)
    check(weight, wide.t().contiguous().t(), is_table=False)  # its rows lie in another order


def test_a_key_that_is_no_parameter_is_charged_once() -> None:
    key = parameter().detach()
    check(key, rows_of(key), kept=key.nbytes)
    # Alone it would keep more alive than it has: as scalars of 16 bits it stays as it is.
    check(key, rows_of(key)[:, 0].contiguous(), is_table=False)


def test_a_payload_keeps_its_key_when_all_else_is_gone() -> None:
    key, store = parameter().detach(), SavedTensorStore(uniquify=True, min_bytes=0)
    map_, weight = rows_of(key), torch.zeros((), requires_grad=True)
    num_bytes = key.nbytes
    with store:
        first = Keep.apply(weight, key)
        second = Keep.apply(weight, map_.clone())
    del first, key
    assert stages(store) == {"reference": 1, "tensor-keyed": 1}
    assert num_bytes < store.stats.held_bytes < map_.nbytes
    second.sum().backward()
    assert bits(Keep.read) == bits(map_)
    del second
    assert store.stats.held_bytes == 0


def test_a_few_odd_rows_are_kept_beside_the_table_and_many_are_not() -> None:
    weight = parameter()
    for num_odd, is_table in ((1, True), (12, True), (500, False)):
        map_ = rows_of(weight).float()
        map_[-num_odd:] = torch.randn(num_odd, 8)
        check(weight, map_, is_table=is_table)


def test_awkward_keys() -> None:
    for key in (torch.empty(0, 3), torch.tensor(1.5), torch.zeros(1, 1), torch.zeros(1).expand(64)):
        weight, store = torch.zeros((), requires_grad=True), SavedTensorStore(uniquify=True, min_bytes=0)
        narrow = key.bfloat16().as_strided(key.shape, key.stride())
        with store:
            output = Keep.apply(weight, narrow, torch.ones(*key.shape, 8))
        output.sum().backward()
        assert bits(Keep.read) == bits(torch.ones(*key.shape, 8))


def changed(change: Callable[[nn.Parameter], object], *, match: str) -> None:
    weight, store = parameter(), SavedTensorStore(uniquify=True, min_bytes=0)
    one = torch.zeros((), requires_grad=True)
    with store:
        output = Keep.apply(one, weight.view(-1), rows_of(weight))
        alone = Keep.apply(one, rows_of(weight))
    assert stages(store)["tensor-keyed"] == 2
    with torch.no_grad():
        change(weight)
    for each in (output, alone):
        with pytest.raises(StaleTensorError, match=match):
            each.sum().backward()


def test_a_key_that_changed_is_refused() -> None:
    """Whether its version tells or not; every row may be that of another value now."""
    changed(lambda weight: weight.add_(1), match="was saved at version")
    changed(lambda weight: weight.untyped_storage().resize_(0), match="its storage has 0 bytes|storage")


def test_a_key_that_changed_behind_its_counter_is_refused() -> None:
    weight, store = parameter(), SavedTensorStore(uniquify=True, min_bytes=0)
    with store:
        output = Keep.apply(torch.zeros((), requires_grad=True), weight, rows_of(weight))
    before = weight.detach().clone()
    weight.data[5, 7] += 1
    with pytest.raises(
        StaleTensorError, match=r"keyed by another one, of shape \(256, 128\), torch.bfloat16"
    ):
        output.sum().backward()
    weight.data.copy_(before)
    output.sum().backward()


def test_equal_bytes_of_a_later_step_do_not_lean_on_a_key_that_changed() -> None:
    """An earlier graph lives on; its payload is lost with its key, and the later save is not."""
    weight, store = parameter(), SavedTensorStore(uniquify=True, min_bytes=0)
    map_, one = rows_of(weight), torch.zeros((), requires_grad=True)
    with store:
        old = Keep.apply(one, weight, map_.clone())
    assert stages(store)["tensor-keyed"] == 1
    with torch.no_grad():
        weight.neg_()
    with store:
        new = Keep.apply(one, map_.clone())
    assert "content" not in stages(store)
    new.sum().backward()
    assert bits(Keep.read) == bits(map_)
    del old


@pytest.mark.parametrize("layer", [dkm, fused_dkm])
def test_the_clustered_weight_of_a_linear_costs_a_table(layer: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """The linear saves it for the gradient of its input: under a store it is a function of the weight."""
    torch.manual_seed(5)
    weight = nn.Parameter((torch.randn(128, 256) * 0.02).bfloat16())
    centroids = torch.linspace(-0.04, 0.04, 8)[:, None].to(torch.float32)

    def gradients(around: SavedTensorStore | None) -> list[bytes]:
        torch.manual_seed(6)
        x = torch.randn(4, 256).bfloat16().requires_grad_()
        weight.grad = None
        if around is None:
            output = nn.functional.linear(x, layer(weight, centroids, temperature=1e-4, iterations=2)[0])
        else:
            with around:
                output = nn.functional.linear(x, layer(weight, centroids, temperature=1e-4, iterations=2)[0])
            num_values = len(weight.detach().view(torch.int16).unique())
            assert stages(around)["tensor-keyed"] >= 1, around.report()
            assert around.stats.held_bytes < weight.nbytes + 20 * num_values * 8 * 4
        output.sum().backward()
        return [bits(x.grad), bits(weight.grad)]

    assert gradients(SavedTensorStore(uniquify=True)) == gradients(None)


def test_a_line_that_wins_again_and_again_still_hears_of_keys() -> None:
    weights = [nn.Parameter(torch.randn(1 << 20).bfloat16()) for _ in range(12)]
    store = SavedTensorStore(uniquify=True)
    held = []
    for _ in range(3):
        with store:
            total = sum(weight.float().exp().sum() for weight in weights)
        held.append(store.stats.held_bytes)
        assert store.stats.num_by_stage["tensor-keyed"] == len(weights)
        total.backward()
    assert max(held) == min(held)
