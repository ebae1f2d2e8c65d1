"""Law 7, never larger: a codec that would not win declines, and every byte that is held is counted."""

import gc
from collections.abc import Callable, Mapping
from itertools import product

import pytest
import torch
from torch import Tensor

from offload import SavedTensorStore
from offload.codecs import DEFAULT_CODECS
from tests.laws.graphs import GRAPHS
from tests.laws.settings import STORES

DECLINING = sorted(name for name in STORES if "forced" not in name)
DTYPES = (torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex64)


def mask(numel: int) -> Tensor:
    return torch.rand(numel) > 0.5


def several(num_values: int) -> Callable[[int], Tensor]:
    return lambda numel: torch.randn(num_values)[torch.randint(num_values, (numel,))]


def repeating_rows(numel: int) -> Tensor:
    return torch.randn(max(1, numel // 64), 8)[torch.randint(max(1, numel // 64), (-(-numel // 8),))].view(
        -1
    )[:numel]


CONTENTS: Mapping[str, Callable[[int], Tensor]] = {
    "distinct": torch.randn,
    "constant": lambda numel: torch.full((numel,), 2.5),
    "mask": mask,
    "rounded": lambda numel: torch.randn(numel).bfloat16().float(),
    "repeating rows": repeating_rows,
    "once different": lambda numel: torch.arange(numel).eq(numel // 2).float(),
    **{f"{number} values": several(number) for number in (3, 17, 255, 257, 4000, 65536, 65537)},
}


class Keep(torch.autograd.Function):
    """Saves a tensor of any dtype."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, weight: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return weight.clone()


@pytest.mark.parametrize("name", DECLINING)
@pytest.mark.parametrize("content", sorted(CONTENTS))
def test_no_tensor_is_held_in_more_bytes_than_it_has(content: str, *, name: str) -> None:
    store, weight = STORES[name](), torch.zeros(1, requires_grad=True)
    for dtype in DTYPES:
        for numel in (0, 1, 2, 7, 64, 513, 1200, 9001):
            tensor = CONTENTS[content](numel).to(dtype)
            with store:
                kept = Keep.apply(weight, tensor.view(-1, 8) if numel and numel % 8 == 0 else tensor)
            storage_bytes = tensor.untyped_storage().nbytes()
            assert store.stats.held_bytes <= storage_bytes, (dtype, numel, store.stats)
            assert store.stats.peak_held_bytes <= 2 * storage_bytes
            del kept


@pytest.mark.parametrize("name", DECLINING)
def test_a_graph_is_held_in_no_more_bytes_than_without_a_store(name: str) -> None:
    store = STORES[name]()
    for build in GRAPHS.values():
        with store:
            loss, _ = build()
        most = store.stats.saved_bytes if "copies" in name else store.stats.storage_bytes
        # A match by content takes a copy, one for both: never more than the two storages.
        assert store.stats.held_bytes <= most, build.__name__
        assert store.stats.held_bytes <= store.stats.peak_held_bytes
        del loss


def test_what_lives_on_is_never_larger_than_what_was_saved() -> None:
    """A keyed table must not keep a list alive that is larger than its own tensor, its maker being gone."""
    store = SavedTensorStore(uniquify=True)
    for num_values in (500, 4000, 20_000):
        x = several(num_values)(100_000).double()
        wide, narrow = torch.ones(100_000, dtype=torch.double, requires_grad=True), x.sign().to(torch.int8)
        weight = torch.zeros(1, requires_grad=True)
        with store:
            first = wide * x
            others = [Keep.apply(weight, each) for each in (x > 0, narrow, x.float(), x.half())]
        del first
        sizes = [100_000, 100_000, 400_000, 200_000]
        while others:
            assert store.stats.held_bytes <= sum(sizes), (num_values, sizes)
            others.pop()
            sizes.pop()
        assert store.stats.held_bytes == 0


def storages() -> dict[int, int]:
    """Return the bytes of every storage that some tensor in Python has, by its address."""
    tensors = [each for each in gc.get_objects() if type(each) is Tensor and each.layout is torch.strided]
    known = {each.untyped_storage() for each in tensors if not each.is_meta}
    return {storage.data_ptr(): storage.nbytes() for storage in known if storage.nbytes()}


@pytest.mark.parametrize("name", sorted(STORES))
def test_held_bytes_are_the_bytes_of_the_tensors_that_are_held(name: str) -> None:
    """Tables, indices, padding: what Python's own books show, the saved tensors being deleted here."""
    store, weight = STORES[name](), torch.zeros(1, requires_grad=True)
    before = storages()
    kept = []
    with store:
        for content, numel in product(sorted(CONTENTS), (3000, 4096)):
            x = CONTENTS[content](numel)
            kept += [Keep.apply(weight, each) for each in (x, x.view(-1, 8), x > 0, x.clone())]
            del x
    after = storages()
    for each in kept:
        after.pop(each.untyped_storage().data_ptr(), None)
    found = sum(num_bytes for address, num_bytes in after.items() if before.get(address) != num_bytes)
    assert store.stats.held_bytes == found


def test_the_default_codecs_win_somewhere() -> None:
    """So that never larger is not had by never encoding."""
    for codec, content in {"bits": "17 values", "cast": "rounded", "rows": "repeating rows"}.items():
        store, weight = SavedTensorStore(uniquify=True), torch.zeros(1, requires_grad=True)
        x = CONTENTS[content](64 * 1024).view(-1, 8)
        with store:
            kept = Keep.apply(weight, x)
        assert store.stats.num_by_stage == {codec: 1}
        assert store.stats.held_bytes <= x.nbytes * 9 // 16
        del kept
    assert {codec.name for codec in DEFAULT_CODECS} == {"bits", "cast", "rows", "keyed", "tensor-keyed"}
