"""Starting centroids, against the optimum by dynamic programming."""

import pytest
import torch

from edkm import PaletteError
from edkm.init import starting_centroids


def optimal_cost(values: torch.Tensor, num_centroids: int) -> float:
    """The least sum of squared distances to `num_centroids` centroids, by dynamic programming."""
    ordered = values.double().sort().values
    ones = torch.cat([torch.zeros(1), torch.arange(1, len(ordered) + 1)]).double()
    first = torch.cat([torch.zeros(1).double(), ordered.cumsum(0)])
    second = torch.cat([torch.zeros(1).double(), ordered.square().cumsum(0)])
    count, total, square = (x[None, :] - x[:, None] for x in (ones, first, second))
    cost = torch.where(count > 0, square - total.square() / count.clamp(min=1), torch.inf)
    cost.fill_diagonal_(0.0)
    best = cost[0]
    for _ in range(num_centroids - 1):
        best = (best[:, None] + cost).amin(0)
    return float(best[-1])


def cost_of(values: torch.Tensor, centroids: torch.Tensor) -> float:
    return float((values.double()[:, None] - centroids.double().flatten()).square().amin(1).sum())


SHAPES = {
    "normal": lambda n: torch.randn(n),
    "uniform": lambda n: torch.rand(n) * 3 + 1,
    "laplace": lambda n: torch.randn(n) * torch.rand(n).log().neg().sqrt(),
    "far from zero": lambda n: torch.randn(n) * 0.01 + 5,
    "small": lambda n: torch.randn(n) * 1e-6,
    "two heaps": lambda n: torch.cat([torch.randn(n // 2) - 8, torch.randn(n - n // 2) * 0.1 + 8]),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_it_is_near_the_optimum(shape: str, bits: int, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and shape == "small":
        pytest.skip("below the normal numbers of float16")
    values = SHAPES[shape](700).to(dtype)
    found = starting_centroids(values, num_centroids=1 << bits)
    best = optimal_cost(values, 1 << bits)
    assert cost_of(values, found) <= 1.15 * best + 1e-12 * float(values.double().square().sum())


def test_an_outlier_does_not_cost_the_others_their_centroids() -> None:
    values = torch.cat([torch.randn(5000) * 0.02, torch.tensor([1e6, -1e6])])
    found = starting_centroids(values, num_centroids=8).flatten()
    assert int((found.abs() < 1).sum()) >= 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_few_values_are_found_exactly(dtype: torch.dtype) -> None:
    values = torch.tensor([-3.0, -0.0, 0.5, 0.75, 2.0], dtype=dtype)
    found = starting_centroids(values.repeat(50)[torch.randperm(250)], num_centroids=8).flatten()
    assert sorted(set(found.tolist())) == values.tolist()
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_the_same_weight_gives_the_same_centroids_and_draws_no_random_number() -> None:
    weight = torch.randn(64, 64)
    for length in (1, 4):
        state = torch.get_rng_state()
        first = starting_centroids(weight, num_centroids=8, vector_length=length, num_groups=4)
        assert first.shape == (4, 8, length)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(1)
        again = starting_centroids(weight, num_centroids=8, vector_length=length, num_groups=4)
        assert torch.equal(first, again)


def test_groups_are_found_alone() -> None:
    weight = torch.randn(6, 32)
    together = starting_centroids(weight, num_centroids=4, num_groups=3)
    for group in range(3):
        alone = starting_centroids(weight[2 * group : 2 * group + 2], num_centroids=4)
        assert torch.equal(together[group : group + 1], alone)


def test_scaling_by_a_power_of_two_scales_the_centroids_exactly() -> None:
    weight = torch.randn(64, 64)
    plain = starting_centroids(weight, num_centroids=8)
    assert torch.equal(starting_centroids(weight / 16, num_centroids=8) * 16, plain)


def test_vectors_find_their_heaps() -> None:
    heaps = torch.tensor([[4.0, 4.0], [-4.0, 4.0], [4.0, -4.0], [-4.0, -4.0]])
    rows = heaps[torch.randint(0, 4, (512,))] + 0.05 * torch.randn(512, 2)
    found = starting_centroids(rows.view(64, 16), num_centroids=4, vector_length=2)[0]
    assert float(torch.cdist(heaps, found).amin(1).max()) < 0.1


def test_fewer_vectors_than_centroids() -> None:
    found = starting_centroids(torch.randn(2, 4), num_centroids=16, vector_length=2)
    assert found.shape == (1, 16, 2)
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("length", [1, 2])
def test_a_weight_that_is_not_finite_is_refused(bad: float, dtype: torch.dtype, length: int) -> None:
    weight = torch.randn(4, 8).to(dtype)
    weight[2, 3] = bad
    with pytest.raises(PaletteError, match=r"shape \[4, 8\]: 1 of its 32 values are NaN or infinite"):
        starting_centroids(weight, num_centroids=4, vector_length=length)


def test_large_vectors_are_drawn_from_all_columns() -> None:
    """Columns of large weights at multiples of 8: a sample in steps that fit the rows would miss some."""
    weight = torch.randn(1024, 512) * 0.02
    weight[:, 1::8] *= 10
    weight[:, 2::8] *= 10
    rows = weight.view(-1, 2)
    errors = []
    for tried in (rows, rows[torch.randperm(rows.shape[0])]):
        found = starting_centroids(tried.reshape(weight.shape), num_centroids=16, vector_length=2)[0]
        errors.append(float(torch.cdist(rows, found).amin(1).square().mean()))
    assert errors[0] < 1.2 * errors[1]


def test_a_large_weight_is_counted_not_sorted() -> None:
    """The rounds run on a histogram of at most 2**20 bins."""
    weight = torch.randn(2048, 2048) * 0.02
    found = starting_centroids(weight, num_centroids=8).flatten()
    # Lloyd's eight levels of a normal distribution, from the tables of Max (1960).
    expected = torch.tensor([0.2451, 0.7560, 1.3439, 2.1520]) * 0.02
    torch.testing.assert_close(found[4:], expected, rtol=0.01, atol=0)
    torch.testing.assert_close(found[:4].flip(0), -expected, rtol=0.01, atol=0)
