"""The short way of a save, compiled, comes to what the whole way in Python does."""

import gc
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload import SavedTensorStore, StaleTensorError
from offload.fast import Packer
from tests.laws.settings import bits, no_gc, whole_way

pytestmark = pytest.mark.skipif(Packer is None, reason="offload/_fast.c was not compiled: no C compiler")
NUM_STEPS = 30
SAVES_OF_A_LINE = 24  # the first ones are looked at; after eight without a win the line is known


class Block(nn.Module):
    """Saves of many kinds: inputs, outputs, views, parameters and views of them, masks, equal tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 96), nn.Linear(96, 48)
        self.norm = nn.LayerNorm(48)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.first(self.norm(x)).relu())
        twice = hidden.to(torch.bfloat16).float() * hidden.to(torch.bfloat16).float().exp()
        return x + self.second(twice) * self.first.weight[:48, :1].t() + x.t().contiguous().t().sin()


STORES: Mapping[str, Callable[[], SavedTensorStore]] = {
    "dedupe": SavedTensorStore,
    "everything": lambda: SavedTensorStore(min_bytes=0, uniquify=True),
    "copies": lambda: SavedTensorStore(dedupe=False, min_bytes=4096),
}


def train(store: SavedTensorStore) -> Sequence[object]:
    """Train for some steps; return what the store told after each, and the gradients."""
    torch.manual_seed(5)
    blocks = nn.Sequential(*(Block() for _ in range(3)))
    told: list[object] = []
    for number in range(NUM_STEPS):
        blocks.zero_grad()
        with store:
            loss = blocks(torch.randn(64 + number % 2, 48, requires_grad=True)).square().sum()
            stats = store.stats if number % 7 == 0 else None
        rows = [(row.site, row.shape, row.dtype, row.num_by_stage, row.kept_bytes) for row in store.rows()]
        told += [stats, store.stats, rows]
        loss.backward()
        told += [bits(each.grad) for each in blocks.parameters()] + [store.stats.held_bytes]
        assert store.stats.held_bytes == 0
    return told


@pytest.mark.parametrize("name", sorted(STORES))
def test_both_ways_tell_and_give_the_same(name: str) -> None:
    assert train(STORES[name]()) == train(whole_way(STORES[name]()))


def sine(store: SavedTensorStore, x: Tensor, *, times: int = 1) -> Tensor:
    """Save `x` on one line."""
    for _ in range(times):
        with store:
            y = x.sin()
    return y


def known(x: Tensor) -> SavedTensorStore:
    """Return a store that knows the line of `sine` for winning nothing."""
    store = SavedTensorStore(min_bytes=4096)
    for _ in range(SAVES_OF_A_LINE):
        sine(store, torch.randn_like(x, requires_grad=True))
    return store


def pack(store: SavedTensorStore, x: Tensor) -> Any:
    """Pack `x` as if an operator saved it, on one line; a line that packs other tensors first is known."""
    assert store._packer is not None
    for each in [torch.randn_like(x) for _ in range(SAVES_OF_A_LINE)] + [x]:
        packed = store._packer.pack(each)
        store.stats  # noqa: B018 - what waits is looked at
    return packed


def test_the_short_way_is_taken_and_a_change_in_place_refused() -> None:
    x = torch.randn(64, 64)
    with SavedTensorStore(min_bytes=4096) as store:
        packed = pack(store, x)
        assert type(packed).__module__ == "offload._fast"
        assert packed.is_reference
        assert packed.open().data_ptr() == x.data_ptr()
    x.add_(1)
    with pytest.raises(StaleTensorError, match="is at version 1 and was saved at version 0"):
        packed.open()


def test_a_storage_that_lost_its_bytes_is_refused() -> None:
    x = torch.randn(64, 64)
    with SavedTensorStore(min_bytes=4096) as store:
        packed = pack(store, x)
    assert type(packed).__module__ == "offload._fast"
    x.untyped_storage().resize_(0)
    with pytest.raises(StaleTensorError, match="its storage has 0 bytes now and had 16384"):
        packed.open()


def test_a_row_is_referred_to_as_often_after_many_steps_as_before() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    store = known(x)
    with no_gc():
        counts = []
        for _ in range(20):
            sine(store, x, times=5).sum().backward()
            assert store.stats.held_bytes == 0
            counts.append([sys.getrefcount(seen.row) for seen in store._seen.values()])
    assert counts[2] == counts[-1]


def test_objects_do_not_add_up() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    store = known(x)
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(300):
        sine(store, x, times=3).sum().backward()
    store.stats  # noqa: B018 - it books what the log has
    gc.collect()
    assert sys.getallocatedblocks() - before < 600


def test_an_error_in_forward_frees_the_graph_and_stays_that_error() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    store = known(x)

    def fail() -> None:
        with store:
            y = x.sin().sin().sin()
            raise ValueError(f"on purpose {y.shape}")

    with no_gc(), pytest.raises(ValueError, match="on purpose"):
        fail()
    assert store.stats.held_bytes == 0


def test_a_graph_may_be_dropped_while_an_error_is_on_its_way() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    store = known(x)

    def fail() -> None:
        with store:
            kept = x.sin().cos().exp()  # ends with the frame, behind the error
        raise KeyError(str(kept.shape))

    with pytest.raises(KeyError, match="64"):
        fail()
    assert store.stats.held_bytes == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(8).to_sparse(),
        lambda: torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)]),
        lambda: torch.empty(8, 8, device="meta"),
        lambda: torch.empty(0, 8),
        lambda: torch.randn(8, 8, dtype=torch.complex64).conj(),
    ],
    ids=["sparse", "nested", "meta", "empty", "conj"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_what_shows_no_plain_storage_goes_the_whole_way(make: Callable[[], Tensor]) -> None:
    odd = make()
    store = SavedTensorStore(min_bytes=0)
    with store:
        for _ in range(SAVES_OF_A_LINE):
            handle = store._packer.pack(odd)  # type: ignore[union-attr]
    opened = handle.open()
    assert opened.layout == odd.layout
    assert opened.device == odd.device
    if not odd.is_nested:
        assert opened.shape == odd.shape


def test_eight_threads_in_one_store() -> None:
    store = SavedTensorStore(min_bytes=4096)
    results: dict[int, bytes] = {}

    def mine(number: int) -> Tensor:
        chance = torch.Generator().manual_seed(number)  # the common one is every thread's
        return torch.randn(64, 64, generator=chance).requires_grad_()

    def work(number: int) -> None:
        x = mine(number)
        for _ in range(60):
            with store:
                y = (x.sin() * x.cos()).exp().tanh()
            y.sum().backward()
        results[number] = bits(x.grad)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.stats.held_bytes == 0
    for number, got in results.items():
        x = mine(number)
        for _ in range(60):
            (x.sin() * x.cos()).exp().tanh().sum().backward()
        assert got == bits(x.grad)
