"""The layer, against a float64 loop written from the formula."""

import math

import pytest
import torch

from edkm import dkm

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 2e-5, torch.float64: 1e-10}


def formula(
    rows: list[list[float]],
    centroids: list[list[float]],
    *,
    temperature: float,
    iterations: int,
    fixed_zero: bool = False,
) -> tuple[list[list[float]], list[list[float]]]:
    """One group, number by number."""
    for _ in range(iterations):
        attention = []
        for row in rows:
            distances = [sum((x - y) ** 2 for x, y in zip(row, c, strict=True)) for c in centroids]
            powers = [math.exp((min(distances) - distance) / temperature) for distance in distances]
            attention.append([power / sum(powers) for power in powers])
        moved = []
        for j in range(len(centroids)):
            mass = sum(shares[j] for shares in attention)
            moved.append(
                [
                    sum(s[j] * row[i] for s, row in zip(attention, rows, strict=True)) / mass
                    for i in range(len(rows[0]))
                ]
            )
        if fixed_zero:
            moved[0] = [0.0] * len(rows[0])
        centroids = moved
    clustered = [
        [sum(s[j] * centroids[j][i] for j in range(len(centroids))) for i in range(len(rows[0]))]
        for s in attention
    ]
    return clustered, centroids


def reference(weight: torch.Tensor, centroids: torch.Tensor, **options: object) -> list[torch.Tensor]:
    num_groups, _, length = centroids.shape
    rows = weight.double().reshape(num_groups, -1, length)
    pairs = [
        formula(part.tolist(), table.tolist(), **options)
        for part, table in zip(rows, centroids.double(), strict=True)
    ]
    clustered = torch.tensor([pair[0] for pair in pairs], dtype=torch.float64).reshape(weight.shape)
    return [clustered, torch.tensor([pair[1] for pair in pairs], dtype=torch.float64)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("groups", "length"), [(1, 1), (1, 3), (2, 1), (4, 2)])
@pytest.mark.parametrize("iterations", [1, 3])
def test_it_is_the_formula(dtype: torch.dtype, groups: int, length: int, iterations: int) -> None:
    weight = torch.randn(8, 6).to(dtype)
    centroids = torch.randn(groups, 5, length)
    clustered, moved = dkm(weight, centroids, temperature=0.3, iterations=iterations)
    expected = reference(weight, centroids, temperature=0.3, iterations=iterations)
    assert clustered.dtype == dtype
    assert clustered.shape == weight.shape
    assert moved.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(clustered.double(), expected[0], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(moved.double(), expected[1], rtol=2e-5, atol=2e-5)


def test_the_first_centroid_can_be_held_at_zero() -> None:
    weight, centroids = torch.randn(6, 4), torch.randn(2, 3, 2)
    centroids[:, 0] = 5.0
    pinned = centroids.clone()
    pinned[:, 0] = 0
    clustered, moved = dkm(weight, centroids, temperature=0.5, iterations=3, fixed_zero=True)
    expected = reference(weight, pinned, temperature=0.5, iterations=3, fixed_zero=True)
    torch.testing.assert_close(clustered.double(), expected[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(moved[:, 0], torch.zeros(2, 2))


@pytest.mark.parametrize("shape", [(4,), (4, 2), (3, 4, 2)])
def test_centroids_come_back_in_their_shape(shape: tuple[int, ...]) -> None:
    centroids = torch.randn(shape, requires_grad=True)
    weight = torch.randn(6, 4, requires_grad=True)
    _, moved = dkm(weight, centroids, temperature=0.3, iterations=2)
    assert moved.shape == shape
    moved.sum().backward()
    assert weight.grad is not None
    assert centroids.grad is not None


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("fixed_zero", [False, True])
@pytest.mark.parametrize("shape", [(3,), (3, 2), (2, 3, 2)])
def test_gradcheck(shape: tuple[int, ...], iterations: int, fixed_zero: bool) -> None:
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    centroids = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def layer(weight: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return dkm(weight, centroids, temperature=0.4, iterations=iterations, fixed_zero=fixed_zero)

    assert torch.autograd.gradcheck(layer, (weight, centroids))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_over_four_million_weights_are_those_of_float64(dtype: torch.dtype) -> None:
    """In fp16 a sum stops at 65,504 weights, in bf16 at 256."""
    weight = (torch.randn(2048, 2048) * 0.02).to(dtype)
    centroids = torch.tensor([-0.02, 0.02])
    with torch.no_grad():
        clustered, moved = dkm(weight, centroids, temperature=1e-4, iterations=1)
    mass, sums = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for part in weight.split(256):
        wide = part.double().reshape(-1, 1)
        attention = torch.softmax(-(wide - centroids.double()).square() / 1e-4, 1)
        mass += attention.sum(0)
        sums += (attention * wide).sum(0)
    expected = sums / mass
    torch.testing.assert_close(moved.double(), expected, rtol=1e-5, atol=0)
    part = weight[:4].double().reshape(-1, 1)
    exact = torch.softmax(-(part - centroids.double()).square() / 1e-4, 1) @ expected
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(clustered[:4].double().reshape(-1), exact, rtol=step, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_empty_cluster_keeps_its_centroid_and_gradients_stay_finite(dtype: torch.dtype) -> None:
    weight = torch.tensor([0.5, 0.5, -0.25], dtype=dtype, requires_grad=True)
    centroids = torch.tensor([0.5, -0.25, 40.0, -80.0], requires_grad=True)
    clustered, moved = dkm(weight, centroids, temperature=1e-3, iterations=3)
    assert moved[2:].tolist() == [40.0, -80.0]
    torch.testing.assert_close(clustered.float(), weight.float())
    (clustered.float().sum() + moved.sum()).backward()
    assert weight.grad is not None
    assert centroids.grad is not None
    assert bool(weight.grad.isfinite().all())
    assert bool(centroids.grad.isfinite().all())


@pytest.mark.parametrize("distance", [0.1, 0.2, 0.25, 0.3, 0.32, 0.4])
def test_gradients_are_finite_while_a_cluster_dies(distance: float) -> None:
    weight = torch.zeros(5, requires_grad=True)
    centroids = torch.tensor([0.0, distance], requires_grad=True)
    clustered, moved = dkm(weight, centroids, temperature=1e-3, iterations=2)
    (clustered.sum() + moved.sum()).backward()
    for gradient in (weight.grad, centroids.grad):
        assert gradient is not None
        assert bool(gradient.isfinite().all())


def test_epsilon_stops_early_and_zero_never_does() -> None:
    weight, centroids = torch.randn(64), torch.tensor([-1.0, 0.0, 1.0])
    far = dkm(weight, centroids, temperature=0.1, iterations=40)[1]
    assert torch.equal(dkm(weight, centroids, temperature=0.1, iterations=40, epsilon=1e-9)[1], far)
    first = dkm(weight, centroids, temperature=0.1, iterations=1)
    stopped = dkm(weight, centroids, temperature=0.1, iterations=40, epsilon=1e9)
    assert all(torch.equal(a, b) for a, b in zip(first, stopped, strict=True))


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(()),
        torch.randn(0, 4),
        torch.randn(6, 8).t(),
        torch.randn(1, 8).expand(6, 8),
        torch.full((4, 4), -0.0),
        torch.randn(7, 13),
    ],
    ids=["0-d", "empty", "transposed", "expanded", "-0.0", "odd"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_awkward_weights(weight: torch.Tensor, dtype: torch.dtype) -> None:
    leaf = weight.to(dtype).requires_grad_()
    centroids = torch.tensor([-1.0, 0.0, 1.0])
    clustered, moved = dkm(leaf, centroids, temperature=0.2, iterations=2)
    assert clustered.shape == weight.shape
    (clustered.sum() + moved.sum()).backward()
    assert leaf.grad is not None
    assert bool(leaf.grad.isfinite().all())
    if weight.numel():
        plain = dkm(leaf.detach().clone().contiguous(), centroids, temperature=0.2, iterations=2)
        torch.testing.assert_close(clustered, plain[0], rtol=0, atol=0)
    else:
        assert torch.equal(moved, centroids)


def test_a_nan_weight_shows() -> None:
    clustered, _ = dkm(torch.tensor([1.0, float("nan")]), torch.ones(2), temperature=1, iterations=1)
    assert clustered.isnan().tolist() == [False, True]


def test_autocast_changes_nothing() -> None:
    weight, centroids = torch.randn(32, 32), torch.randn(8)
    plain = dkm(weight, centroids, temperature=0.1, iterations=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = dkm(weight, centroids, temperature=0.1, iterations=2)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_a_row_of_the_map_is_a_function_of_a_narrow_weight_and_lies_in_one_piece() -> None:
    """What lets a store keep equal rows once."""
    saved: list[torch.Tensor] = []
    weight = torch.randn(64, 64).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dkm(weight, torch.randn(8), temperature=0.1, iterations=1)
    maps = [t for t in saved if t.numel() == weight.numel() * 8]
    assert maps
    num_distinct = weight.detach().view(torch.int16).unique().numel()
    for found in maps:
        rows = torch.empty(0).set_(found.untyped_storage()).view(-1, 8)
        assert rows.unique(dim=0).shape[0] <= num_distinct


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_wrong_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"dkm got a weight of .* real floating-point"):
        dkm(torch.zeros(4).to(dtype), torch.zeros(2), temperature=1.0, iterations=1)
    with pytest.raises(TypeError, match=r"dkm got a centroids of .* real floating-point"):
        dkm(torch.zeros(4), torch.zeros(2).to(dtype), temperature=1.0, iterations=1)


@pytest.mark.parametrize(
    ("weight", "centroids"), [((3, 3), (2, 2)), ((5, 4), (2, 8, 1)), ((3,), (2, 2)), ((), (4, 2))]
)
def test_shapes_that_do_not_part(weight: tuple[int, ...], centroids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must part into"):
        dkm(torch.zeros(weight), torch.zeros(centroids), temperature=1.0, iterations=1)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1, 2, 3, 4)])
def test_centroids_of_no_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"dkm got centroids of shape"):
        dkm(torch.zeros(4), torch.zeros(shape), temperature=1.0, iterations=1)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperature_is_above_zero(temperature: float) -> None:
    with pytest.raises(ValueError, match="dkm got the temperature"):
        dkm(torch.zeros(4), torch.zeros(2), temperature=temperature, iterations=1)


@pytest.mark.parametrize("options", [{"iterations": 0}, {"iterations": 1, "epsilon": -1.0}])
def test_iterations_and_epsilon(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="iterations, epsilon"):
        dkm(torch.zeros(4), torch.zeros(2), temperature=1.0, **options)
