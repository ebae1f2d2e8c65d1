"""Law 5, one copy: views of one storage share a payload, equal addresses never do, equal bytes do."""

import weakref

import pytest
import torch
from torch import Tensor

from offload import SavedTensorStore
from tests.laws.settings import STORES, bits

SHARING = sorted(name for name in STORES if "copies" not in name)
KEPT_BYTES = 64 * 48 * 4


def save(store: SavedTensorStore, *tensors: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Save each tensor once and return outputs with the leaf whose gradient is what was saved."""
    saved = []
    with store:
        for tensor in tensors:
            weight = torch.ones(tensor.shape, dtype=tensor.dtype, requires_grad=True)
            saved.append((weight * tensor, weight))
    return saved


def check(saved: list[tuple[Tensor, Tensor]], *, expected: list[Tensor]) -> None:
    """Assert that every save comes back."""
    for (output, weight), tensor in zip(saved, expected, strict=True):
        (gradient,) = torch.autograd.grad(output, weight, torch.ones_like(output))
        # The product's gradient is the conjugate of what was saved.
        assert bits(gradient.conj().resolve_conj()) == bits(tensor)


def views_of(x: Tensor) -> list[Tensor]:
    wide = x.as_strided((3, *x.shape), (0, *x.stride()), x.storage_offset())
    return [
        x,
        x.t(),
        x[1:, ::2],
        x.flatten(),
        x.view(48, 64),
        x.unsqueeze(1),
        *x.chunk(3),
        wide,
        x.unfold(0, 4, 3),
    ]


@pytest.mark.parametrize("values", ["many", "few"])
@pytest.mark.parametrize("name", SHARING)
def test_the_views_of_a_storage_share_one_payload(name: str, *, values: str) -> None:
    x = torch.randn(64, 48) if values == "many" else torch.randn(64, 48).sign()
    alone, all_views = STORES[name](), STORES[name]()
    one = save(alone, x)
    views = save(all_views, *views_of(x))
    assert all_views.stats.held_bytes == alone.stats.held_bytes > 0
    assert all_views.stats.storage_bytes == KEPT_BYTES
    assert all_views.stats.saved_bytes == sum(view.numel() * 4 for view in views_of(x))
    check(one + views, expected=[x, *views_of(x)])


@pytest.mark.parametrize(
    "name", ["uniquify", "encoded copies", "forced", "forced raw", "forced bits", "copies"]
)
def test_each_version_has_a_payload_of_its_own(name: str) -> None:
    store, x = STORES[name](), torch.zeros(64, 48)
    contents, saved = [], []
    for number in range(4):
        x.fill_(number % 3 + 0.5)
        contents.append(x.clone())
        saved += save(store, x, x.t())
    check(saved, expected=[each for content in contents for each in (content, content.t())])


@pytest.mark.parametrize("name", SHARING)
def test_equal_bytes_in_another_storage_are_held_once(name: str) -> None:
    x = torch.randn(64, 48)
    alone, store = STORES[name](), STORES[name]()
    one = save(alone, x)
    twins = [x.clone(), x.clone(), x.clone().view(torch.int32).view(torch.float32)]
    first = save(store, x)
    rest = save(store, *twins)
    assert store.stats.held_bytes == alone.stats.held_bytes
    assert store.stats.num_by_stage.get("content", 0) == 3
    check(one + first + rest, expected=[x, x, *twins])


def test_a_match_takes_a_copy_of_its_own_and_frees_both_storages() -> None:
    """Else the twin's save would read through a tensor that somebody else may write to."""
    store = SavedTensorStore(min_bytes=4096)
    x = torch.randn(64, 48)
    twin, content = x.clone(), x.clone()
    storages = [weakref.ref(each.untyped_storage()) for each in (x, twin)]
    saved = save(store, x, twin)
    x.add_(1), twin.data.mul_(2)
    assert store.stats.held_bytes == KEPT_BYTES
    del x, twin
    assert [storage() for storage in storages] == [None, None]
    check(saved, expected=[content, content])


@pytest.mark.parametrize("name", SHARING)
def test_nearly_equal_bytes_are_not_merged(name: str) -> None:
    """One bit, the order of rows, a sign of zero, a pair of equal values: none is the same content."""
    x = torch.randn(64, 48)
    x[0, 0], x[5] = 0.0, x[6]
    flipped, swapped, negative = x.clone(), x.clone(), x.clone()
    flipped.view(torch.int32)[63, 47] ^= 1
    swapped[[10, 11]] = x[[11, 10]]
    negative[0, 0] = -0.0
    several = [x, flipped, swapped, negative, torch.cat([x[5:7].flip(0), x]), x[:63], x.double()]
    several = [each.clone() for each in several]
    saved = save(STORES[name](), *several)
    check(saved, expected=several)


@pytest.mark.parametrize("name", SHARING)
def test_equal_bytes_of_another_dtype_and_shape_come_back_as_they_were(name: str) -> None:
    patterns = torch.randint(0x3F00, 0x3FFF, (96, 32), dtype=torch.int16)
    several = [
        patterns.view(torch.bfloat16),
        patterns.view(torch.bfloat16).clone().t(),
        patterns.clone().view(torch.float16),
        patterns.clone().view(torch.float32),
        patterns.clone().view(torch.float64),
        patterns.clone().view(torch.complex64).conj(),
    ]
    saved = save(STORES[name](), *several)
    check(saved, expected=[each.resolve_conj() for each in several])


@pytest.mark.parametrize(("name", "num_rounds"), [("at least 4 KiB", 10_000), ("uniquify", 2_500)])
def test_ten_thousand_recycled_addresses_are_never_merged(name: str, *, num_rounds: int) -> None:
    """Allocate, save, free, allocate: the address comes back, and mostly the version too."""
    store = STORES[name]()
    alive: list[tuple[Tensor, Tensor, float]] = []
    addresses: set[int] = set()
    num_recycled = 0
    for number in range(num_rounds):
        value = float(number)
        tensor = torch.full((1200 + 8 * (number % 3),), value)
        if number % 2:
            tensor[number % 1200] = -1.0
        num_recycled += tensor.data_ptr() in addresses
        addresses.add(tensor.data_ptr())
        alive += [(*save(store, tensor)[0], value)]
        del tensor
        if len(alive) > number % 4:
            (output, weight, value) = alive.pop(number % len(alive))
            (gradient,) = torch.autograd.grad(output.sum(), weight)
            assert ((gradient == value) | (gradient == -1)).all(), number
            del output, weight, gradient
    assert num_recycled > num_rounds / 2
    alive.clear()
    assert store.stats.held_bytes == 0


@pytest.mark.parametrize("name", sorted(STORES))
def test_an_address_that_comes_back_inside_one_step_is_another_tensor(name: str) -> None:
    """Dropped within the context, before anything was settled, and its place taken at once."""
    store = STORES[name]()
    weight = torch.ones(2000, requires_grad=True)
    for value in range(40):
        with store:
            first = weight * torch.full((2000,), float(value))
            del first
            second = weight * torch.full((2000,), value + 0.5)
        assert torch.autograd.grad(second.sum(), weight)[0].unique().tolist() == [value + 0.5]


@pytest.mark.parametrize("name", sorted(STORES))
def test_two_noise_buffers_of_equal_garbage_are_two(name: str, *, monkeypatch: pytest.MonkeyPatch) -> None:
    """`rrelu` saves its noise before it fills it; here both buffers start with equal bytes."""

    def gradients(store: SavedTensorStore | None) -> list[Tensor]:
        torch.manual_seed(1)
        x = torch.randn(64, 48, requires_grad=True)
        noises = [torch.zeros(64, 48), torch.zeros(64, 48)]
        with store or torch.enable_grad():
            outputs = [torch._C._nn.rrelu_with_noise(x, noise, 0.1, 0.9, True) for noise in noises]
        assert not torch.equal(*noises)
        return [torch.autograd.grad(output.sum(), x)[0] for output in outputs]

    expected = gradients(None)
    assert not torch.equal(*expected)
    assert all(torch.equal(*pair) for pair in zip(gradients(STORES[name]()), expected, strict=True))


@pytest.mark.parametrize("name", sorted(STORES))
def test_rrelu_of_torch_itself_is_right(name: str) -> None:
    def gradient(store: SavedTensorStore | None) -> Tensor:
        torch.manual_seed(1)
        x = torch.randn(64, 48, requires_grad=True)
        for _ in range(5):
            with store or torch.enable_grad():
                y = torch.rrelu(torch.rrelu(x, training=True), training=True) + torch.rrelu(x, training=True)
            y.sum().backward()
        return x.grad

    assert torch.equal(gradient(STORES[name]()), gradient(None))
