"""The fused layer, against the plain one in float64 and its autograd."""

import itertools
import math

import pytest
import torch

from edkm import dkm, fused_dkm
from edkm.fused_passes import Rows, moments

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
STEPS = {torch.float16: 6e-4, torch.bfloat16: 5e-3, torch.float32: 2e-5, torch.float64: 1e-10}


def step(layer, weight, centroids, temperature=0.3, *, incoming=None, **options):
    """Outputs, then gradients of weight, centroids and temperature; fresh leaves, all in float64."""
    wide = torch.promote_types(weight.dtype, centroids.dtype)
    leaves = [
        weight.detach().clone().requires_grad_(),
        centroids.detach().to(wide, copy=True).requires_grad_(),
    ]
    leaves.append(torch.tensor(temperature, dtype=torch.float64, requires_grad=True))
    outputs = layer(leaves[0], leaves[1], temperature=leaves[2], **options)
    given = incoming or drawn(weight, centroids)
    torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip(given, outputs, strict=True)])
    return [each.detach().double() for each in outputs] + [leaf.grad.double() for leaf in leaves]


def drawn(weight, centroids):
    """Gradients to begin with, in bits that every dtype has."""
    return [torch.randn(weight.shape).half().bfloat16(), torch.randn(centroids.shape)]


def assert_is_dkm(weight, centroids, **options):
    """Right to the dtype's own step, or a few times as near as the plain layer comes."""
    incoming = drawn(weight, centroids)
    exact = step(dkm, weight.double(), centroids.double(), incoming=incoming, **options)
    plain = step(dkm, weight, centroids, incoming=incoming, **options)
    mine = step(fused_dkm, weight, centroids, incoming=incoming, **options)
    for number, (one, near, right) in enumerate(zip(mine, plain, exact, strict=True)):
        # Outputs and gradients have the weight's dtype or a wider one.
        tolerance = STEPS[weight.dtype] * float(right.norm()) + 4 * float((near - right).norm())
        assert one.shape == right.shape
        assert float((one - right).norm()) <= tolerance + 1e-9, number


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (5, 1), (6, 3), (1, 6, 1), (2, 5, 1), (4, 3, 2)], ids=str)
@pytest.mark.parametrize("iterations", [1, 2, 10])
@pytest.mark.parametrize("fixed_zero", [False, True])
def test_it_is_dkm(dtype: torch.dtype, shape: tuple[int, ...], iterations: int, fixed_zero: bool) -> None:
    weight, centroids = torch.randn(8, 18).to(dtype), torch.randn(shape)
    assert_is_dkm(weight, centroids, iterations=iterations, fixed_zero=fixed_zero)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "centroids"),
    [
        ((301, 907), (3,)),  # several chunks of the table road, the last one short
        ((2, 140_001), (2, 3, 1)),
        ((120, 911), (7, 2)),  # several pieces of vectors
        ((40, 100), (40, 4, 1)),  # small groups, several at once
        ((12, 4001), (12, 40, 1)),  # several groups at once, the last ones fewer
        ((700, 10), (256,)),
    ],
    ids=str,
)
def test_it_is_dkm_in_pieces(dtype: torch.dtype, shape: tuple[int, ...], centroids: tuple[int, ...]) -> None:
    weight = (torch.randn(shape) * 0.02 + 0.01).to(dtype)
    starts = torch.randn(centroids) * 0.03
    assert_is_dkm(weight, starts, temperature=1e-4, iterations=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_few_values_in_many_groups_are_tables(dtype: torch.dtype) -> None:
    weight = (torch.randint(-4, 5, (16, 300)) / 8).to(dtype)
    assert_is_dkm(weight, torch.randn(8, 3, 1), temperature=0.1, iterations=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_pattern_there_is(dtype: torch.dtype) -> None:
    """All 65,536, infinities and NaN among them; the plain layer overflows at the largest."""
    weight = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)[torch.randperm(65536)]
    centroids = torch.tensor([-1.0, 0.0, 0.5])
    clustered, moved = fused_dkm(weight, centroids, temperature=0.1, iterations=2)
    assert torch.equal(clustered.isfinite(), weight.isfinite())
    assert torch.equal(moved, centroids)
    small = weight[weight.float().abs() < 16]
    mine = fused_dkm(small, centroids, temperature=0.1, iterations=2)
    plain = dkm(small, centroids, temperature=0.1, iterations=2)
    torch.testing.assert_close(mine[0], plain[0], rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(mine[1], plain[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_weight_shows_where_it_does_in_dkm(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 6).to(dtype)
    weight[1, 2] = float("nan")
    mine = step(fused_dkm, weight, torch.randn(3), incoming=[torch.ones(4, 6), torch.ones(3)], iterations=2)
    assert mine[0].isnan().nonzero().tolist() == [[1, 2]]
    assert bool(mine[2][1, 2].isnan())
    assert bool(mine[1].isfinite().all())


def test_a_nan_gradient_shows_where_it_does_in_dkm() -> None:
    for dtype in DTYPES:
        incoming = [torch.randn(4, 6), torch.randn(3)]
        incoming[0][2, 3] = float("nan")
        found = [
            step(
                layer,
                torch.ones(4, 6).to(dtype),
                torch.tensor([0.5, 1.0, 2.0]),
                incoming=incoming,
                iterations=2,
            )
            for layer in (fused_dkm, dkm)
        ]
        assert all(bool(a.isnan().all()) == bool(b.isnan().all()) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_empty_cluster_keeps_its_centroid_and_gradients_are_those_of_dkm(dtype: torch.dtype) -> None:
    weight, centroids = torch.tensor([0.5, 0.5, -0.25]).to(dtype), torch.tensor([0.5, -0.25, 40.0, -80.0])
    mine = step(fused_dkm, weight, centroids, 1e-3, incoming=[torch.ones(3), torch.ones(4)], iterations=3)
    exact = step(dkm, weight, centroids, 1e-3, incoming=[torch.ones(3), torch.ones(4)], iterations=3)
    assert mine[1][2:].tolist() == [40.0, -80.0]
    for one, other in zip(mine, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distance", [0.0, 0.1, 0.2, 0.25, 0.3, 0.32, 0.4])
def test_gradients_are_finite_while_a_cluster_dies(distance: float, dtype: torch.dtype) -> None:
    weight, centroids = torch.zeros(5).to(dtype), torch.tensor([0.0, distance, distance])
    found = step(fused_dkm, weight, centroids, 1e-3, iterations=2)
    assert all(bool(each.isfinite().all()) for each in found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_duplicates(dtype: torch.dtype) -> None:
    weight = torch.randint(0, 3, (9, 9)).to(dtype)
    assert_is_dkm(weight, torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0]), temperature=0.2, iterations=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4,), (2, 4, 1), (3, 2)], ids=str)
def test_epsilon_stops_where_dkm_stops(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight, centroids = torch.randn(12, 12).to(dtype), torch.randn(shape)
    path = [centroids.double()]
    for _ in range(8):
        path.append(dkm(weight.double(), path[-1], temperature=0.3, iterations=1)[1])
    moves = [float((after - before).abs().max()) for before, after in itertools.pairwise(path)]
    # The first iteration after the first that moved less than all before it, by a margin.
    last = next(n for n in range(1, 8) if moves[n] < 0.9 * min(moves[:n]))
    epsilon = math.sqrt(moves[last] * min(moves[:last]))
    assert_is_dkm(weight, centroids, iterations=40, epsilon=epsilon)
    stopped = fused_dkm(weight, centroids, temperature=0.3, iterations=40, epsilon=epsilon)
    by_count = fused_dkm(weight, centroids, temperature=0.3, iterations=last + 1)
    assert all(torch.equal(a, b) for a, b in zip(stopped, by_count, strict=True))


AWKWARD = {
    "0-d": ((), lambda t: t),
    "empty": ((0, 4), lambda t: t),
    "transposed": ((6, 8), lambda t: t.t()),
    "strided": ((13, 9), lambda t: t[::2, 1::3]),
    "expanded": ((1, 8), lambda t: t.expand(6, 8)),
    "odd": ((7, 13), lambda t: t),
    "-0.0": ((4, 4), lambda t: t.zero_().neg_()),
}


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_awkward_weights(name: str, dtype: torch.dtype) -> None:
    shape, lay = AWKWARD[name]
    leaf = lay(torch.randn(shape).to(dtype)).requires_grad_()
    centroids = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
    clustered, moved = fused_dkm(leaf, centroids, temperature=0.2, iterations=2)
    assert clustered.shape == leaf.shape
    [once] = torch.autograd.grad(clustered.sum(), leaf, retain_graph=True)  # from an expanded gradient
    [again] = torch.autograd.grad(clustered.sum(), leaf)
    assert torch.equal(once, again)
    exact = leaf.detach().double().contiguous().requires_grad_()
    expected, expected_moved = dkm(exact, centroids.detach().double(), temperature=0.2, iterations=2)
    [gradient] = torch.autograd.grad(expected.sum(), exact)
    step = STEPS[dtype]
    torch.testing.assert_close(clustered.double(), expected, rtol=4 * step, atol=step)
    torch.testing.assert_close(moved.double(), expected_moved, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(once.double(), gradient, rtol=4 * step, atol=step)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)], ids=str)
def test_only_the_gradients_that_are_asked_for(dtype: torch.dtype, needed: tuple[bool, bool]) -> None:
    weight = torch.randn(6, 6).to(dtype)
    centroids = torch.randn(3, dtype=torch.promote_types(dtype, torch.float32))
    incoming = drawn(weight, centroids)
    both = step(fused_dkm, weight, centroids, incoming=incoming, iterations=2)
    leaves = [each.requires_grad_(need) for each, need in zip((weight, centroids), needed, strict=True)]
    outputs = fused_dkm(*leaves, temperature=0.3, iterations=2)
    assert all(output.requires_grad == any(needed) for output in outputs)
    if any(needed):
        torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip(incoming, outputs, strict=True)])
    for leaf, need, expected in zip(leaves, needed, both[2:4], strict=True):
        assert (leaf.grad is not None) == need
        assert not need or torch.equal(leaf.grad.double(), expected)


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_output_alone(dtype: torch.dtype, output: int) -> None:
    weight, centroids = torch.randn(6, 6).to(dtype), torch.randn(3)
    found = []
    for layer, wide in ((fused_dkm, weight), (dkm, weight.double())):
        starts = centroids.to(torch.promote_types(wide.dtype, torch.float32), copy=True)
        leaves = [wide.clone().requires_grad_(), starts.requires_grad_()]
        outputs = layer(*leaves, temperature=0.3, iterations=2)
        outputs[output].sum().backward()
        found.append([leaf.grad.double() for leaf in leaves])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=4 * STEPS[dtype], atol=STEPS[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_over_four_million_weights_are_those_of_float64(dtype: torch.dtype) -> None:
    """In fp16 a sum stops at 65,504 weights, in bf16 at 256."""
    weight = (torch.randn(2048, 2048) * 0.02).to(dtype)
    centroids = torch.tensor([-0.02, 0.02])
    leaf = weight.clone().requires_grad_()
    _, moved = fused_dkm(leaf, centroids, temperature=1e-4, iterations=1)
    mass, sums = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for part in weight.split(256):
        wide = part.double().reshape(-1, 1)
        attention = torch.softmax(-(wide - centroids.double()).square() / 1e-4, 1)
        mass += attention.sum(0)
        sums += (attention * wide).sum(0)
    torch.testing.assert_close(moved.double(), sums / mass, rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    "value", [0.25, torch.tensor(0.25), torch.tensor([0.25]), torch.tensor(0.25).double()]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_temperature_of_any_make(dtype: torch.dtype, value: float | torch.Tensor) -> None:
    weight, centroids = torch.randn(6, 6).to(dtype), torch.randn(3)
    mine = fused_dkm(weight, centroids, temperature=value, iterations=2)
    expected = fused_dkm(weight, centroids, temperature=0.25, iterations=2)
    assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))
    if isinstance(value, torch.Tensor):
        leaf = value.clone().requires_grad_()
        fused_dkm(weight, centroids, temperature=leaf, iterations=2)[0].sum().backward()
        assert (leaf.grad.shape, leaf.grad.dtype) == (value.shape, value.dtype)


@pytest.mark.parametrize("scale", [1e-11, 1e-13])
def test_a_temperature_whose_square_underflows(scale: float) -> None:
    weight, centroids = torch.randn(64) * scale, torch.linspace(-1, 1, 4) * scale
    found = []
    for layer, dtype in ((fused_dkm, torch.float32), (dkm, torch.float64)):
        temperature = torch.tensor(0.1 * scale**2, dtype=dtype, requires_grad=True)
        clustered = layer(weight.to(dtype), centroids.to(dtype), temperature=temperature, iterations=2)[0]
        (slope,) = torch.autograd.grad(clustered.square().sum() / scale**2, temperature)
        found.append(float(slope) * scale**2)
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_on_the_meta_device(dtype: torch.dtype) -> None:
    weight = torch.empty(6, 4, dtype=dtype, device="meta", requires_grad=True)
    clustered, moved = fused_dkm(weight, torch.empty(2, 3, 1, device="meta"), temperature=0.1, iterations=2)
    assert (clustered.shape, clustered.dtype, clustered.device.type) == ((6, 4), dtype, "meta")
    assert (moved.shape, moved.dtype) == ((2, 3, 1), torch.promote_types(dtype, torch.float32))
    clustered.sum().backward()
    assert weight.grad.shape == weight.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_attention_is_subnormal(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    # A second centroid so far off that its attention would be normal, subnormal, and zero.
    far = (-math.log(tiny) + torch.arange(-300, 40, dtype=dtype)).clamp(min=0).sqrt()
    centroids = torch.stack([torch.zeros_like(far), far], dim=1).unsqueeze(2)
    rows = Rows(torch.zeros(340, 1, 1, dtype=dtype), None, 1.0, dtype, needs_temperature=False)
    mass, _ = moments(rows, centroids)
    assert bool(((mass == 0) | (mass >= tiny**0.75)).all())
    assert 340 < int((mass > 0).sum()) < 680
