"""What the fused layer saves, and that it keeps to the laws of what surrounds it."""

import pytest
import torch
from torch import is_tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from edkm import DKMConfig, cluster, fused_dkm
from offload import SavedTensorStore

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CENTROIDS = [(8,), (8, 2), (16, 8, 1)]


def leaves(dtype: torch.dtype, shape: tuple[int, ...]) -> list[torch.Tensor]:
    return [
        nn.Parameter((torch.randn(64, 96) * 0.02).to(dtype)),
        nn.Parameter(torch.randn(shape) * 0.03),
        torch.tensor(1e-4, requires_grad=True),
    ]


def forward(inputs: list[torch.Tensor]) -> torch.Tensor:
    clustered, moved = fused_dkm(*inputs[:2], temperature=inputs[2], iterations=3)
    return (clustered.double() * torch.linspace(-1, 1, 96)).sum() + moved.square().sum()


def gradients(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(forward(inputs), inputs))


def assert_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CENTROIDS, ids=str)
@pytest.mark.parametrize("size", [64, 1000])
def test_only_the_weight_itself_and_the_way_of_the_centroids_are_saved(
    dtype: torch.dtype, shape: tuple[int, ...], size: int
) -> None:
    saved: list[torch.Tensor] = []
    weight, centroids = nn.Parameter(torch.randn(size, 96).to(dtype)), nn.Parameter(torch.randn(shape))
    shapes = centroids.reshape(-1, *shape[-2:]) if len(shape) > 1 else centroids.reshape(1, -1, 1)
    if size % shapes.shape[0]:
        weight = nn.Parameter(torch.randn(16 * size, 96).to(dtype))
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused_dkm(weight, centroids, temperature=torch.tensor(0.1, requires_grad=True), iterations=3)
    assert sum(each is weight for each in saved) == 1
    # Four places of each centroid and three masses of it in float64, where it began, the temperature.
    num_centroids = centroids.numel() // shapes.shape[2]
    limit = 8 * (4 * centroids.numel() + 3 * num_centroids) + centroids.nbytes + 8
    assert sum(each.nbytes for each in saved if each is not weight) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CENTROIDS, ids=str)
def test_under_a_store(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    inputs = leaves(dtype, shape)
    plain = gradients(inputs)
    with SavedTensorStore(uniquify=True) as store:
        loss = forward(inputs)
    held = store.stats
    # Behind the layer the loss saves what it multiplied with; the layer itself is a few centroids.
    assert held.held_bytes <= 96 * 8 + 12 * 8 * inputs[1].numel() + 64
    assert_same(list(torch.autograd.grad(loss, inputs)), plain)
    del loss
    assert store.stats.held_bytes == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpoint(dtype: torch.dtype, reentrant: bool) -> None:
    inputs = leaves(dtype, (8,))
    plain = gradients(inputs)
    loss = checkpoint(lambda *each: forward(list(each)), *inputs, use_reentrant=reentrant)
    loss.backward()
    assert_same([each.grad for each in inputs], plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backward_inside", [True, False])
def test_autocast_changes_nothing(dtype: torch.dtype, backward_inside: bool) -> None:
    inputs = leaves(dtype, (8,))
    plain = gradients(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = forward(inputs)
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    assert_same([each.grad for each in inputs], plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(dtype: torch.dtype, mode: type) -> None:
    inputs = leaves(dtype, (8,))
    with_graph = fused_dkm(*inputs[:2], temperature=inputs[2], iterations=2)
    with mode():
        without = fused_dkm(*inputs[:2], temperature=inputs[2], iterations=2)
    assert not any(each.requires_grad for each in without)
    assert_same(list(without), list(with_graph))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_argument_changed_in_place_is_refused_by_pytorch(dtype: torch.dtype, number: int) -> None:
    inputs = leaves(dtype, (8,))
    loss = forward(inputs)
    with torch.no_grad():
        inputs[number].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_returned_may_be_changed_in_place(dtype: torch.dtype) -> None:
    inputs = leaves(dtype, (8,))
    clustered, moved = fused_dkm(*inputs[:2], temperature=inputs[2], iterations=1)
    plain = torch.autograd.grad(clustered.sum() * 2 + moved.sum() * 2, inputs, retain_graph=True)
    assert_same(list(torch.autograd.grad(clustered.mul_(2).sum() + moved.mul_(2).sum(), inputs)), list(plain))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8,), (8, 2), (2, 8, 1)], ids=str)
def test_the_same_bits_run_to_run(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = (torch.randn(600, 500) * 0.02).to(dtype)
    incoming, centroids = torch.randn(600, 500).to(dtype), torch.randn(shape) * 0.03
    runs = []
    for _ in range(3):
        # At an address, and after allocations, of its own.
        inputs = [weight.clone().requires_grad_(), centroids.clone().requires_grad_()]
        clustered, moved = fused_dkm(*inputs, temperature=1e-4, iterations=3)
        runs.append([clustered, moved, *torch.autograd.grad([clustered], inputs, [incoming])])
        torch.randn(len(runs) * 1001)
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


class Allocations(TorchDispatchMode):
    """The bytes of every storage that an operation made, by its address."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if is_tensor(each)}
        made = [each.untyped_storage() for each in tree_leaves(result) if is_tensor(each)]
        self.sizes += [each.nbytes() for each in made if each.data_ptr() not in given]
        return result


@pytest.mark.parametrize(
    ("dtype", "shape", "size", "num_large"),
    [
        (torch.bfloat16, (8,), 2048, 2),  # what is returned, and the gradient
        (torch.float32, (8,), 1024, 2),
        (torch.float32, (16,), 1024, 2),
        (torch.float32, (8, 2), 1024, 2),
        (torch.bfloat16, (8, 2), 1024, 3),  # the gradient is summed in fp32
    ],
    ids=str,
)
def test_nothing_else_grows_with_the_weight(
    dtype: torch.dtype, shape: tuple[int, ...], size: int, num_large: int
) -> None:
    weight = (torch.randn(size, size) * 0.02).to(dtype).requires_grad_()
    centroids, incoming = torch.randn(shape) * 0.03, torch.randn(size, size).to(dtype)
    with Allocations() as forward:
        clustered, _ = fused_dkm(weight, centroids, temperature=1e-4, iterations=1)
    with Allocations() as backward:
        torch.autograd.grad(clustered, weight, incoming)
    # Each smaller than half of what the weight takes: pieces' maps of 1 MiB, the table road's chunks of 2.
    limit = weight.nbytes // 2
    assert sum(each > limit for each in forward.sizes + backward.sizes) == num_large


def test_cluster_uses_it() -> None:
    saved: list[torch.Tensor] = []
    linear = nn.Linear(64, 64).bfloat16()
    cluster(linear, DKMConfig(bits=3))
    weight = linear.parametrizations["weight"].original
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        clustered = linear.weight
    assert clustered.requires_grad
    assert sum(each is weight for each in saved) == 1
    assert sum(each.nbytes for each in saved if each is not weight) < 1000


def test_a_weight_written_blindly_beside_a_kept_table_has_no_gradient() -> None:
    """NaN, which is seen, and not one of the values before. A counted write is refused as ever."""
    weight = torch.linspace(-1, 1, 16).bfloat16().repeat(64, 100).requires_grad_()
    clustered, _ = fused_dkm(weight, torch.linspace(-1, 1, 4), temperature=0.1, iterations=1)
    weight.data[0].mul_(1.3)
    (gradient,) = torch.autograd.grad(clustered.sum(), weight)
    assert gradient[0].isnan().any()
    assert gradient[1:].isfinite().all()
