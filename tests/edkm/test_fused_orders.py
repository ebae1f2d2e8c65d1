"""First and second derivatives of the fused layer, by finite differences and by the plain layer."""

import pytest
import torch

from edkm import dkm, fused_dkm

SHAPES = [(3,), (3, 2), (2, 3, 1), (2, 3, 2)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    weight = torch.randn(4, 4).to(dtype).requires_grad_()
    centroids = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    return [weight, centroids, torch.tensor(0.4, dtype=torch.float64, requires_grad=True)]


@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("fixed_zero", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradcheck(shape: tuple[int, ...], iterations: int, fixed_zero: bool) -> None:
    def layer(
        weight: torch.Tensor, centroids: torch.Tensor, temperature: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return fused_dkm(
            weight, centroids, temperature=temperature, iterations=iterations, fixed_zero=fixed_zero
        )

    assert torch.autograd.gradcheck(layer, inputs(shape))


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradgradcheck(shape: tuple[int, ...], iterations: int) -> None:
    def layer(
        weight: torch.Tensor, centroids: torch.Tensor, temperature: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return fused_dkm(weight, centroids, temperature=temperature, iterations=iterations)

    assert torch.autograd.gradgradcheck(layer, inputs(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_second_order_stops_where_the_first_pass_stopped(dtype: torch.dtype) -> None:
    leaves = inputs((3,), dtype)
    found = []
    for layer, options in ((fused_dkm, {"iterations": 40, "epsilon": 1e9}), (dkm, {"iterations": 1})):
        clustered, _ = layer(*leaves[:2], temperature=leaves[2], **options)
        first = torch.autograd.grad(clustered.square().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(each.square().sum() for each in first), leaves))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_gradient_takes_no_way_outside_of_the_layer() -> None:
    """Centroids, and what is wanted of the weight, come from the same tensor."""
    base = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)

    def both(base: torch.Tensor) -> torch.Tensor:
        return fused_dkm(base * 2, base[0], temperature=base.square().mean(), iterations=2)[0]

    assert torch.autograd.gradcheck(both, [base])
    assert torch.autograd.gradgradcheck(both, [base])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_create_graph_alone_gives_the_same_gradient(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 6).to(dtype).requires_grad_()
    clustered = fused_dkm(weight, torch.tensor([-1.0, 0.0, 1.0]), temperature=0.3, iterations=2)[0]
    found = [
        torch.autograd.grad(clustered.sum(), weight, retain_graph=True, create_graph=graph)[0]
        for graph in (False, True)
    ]
    torch.testing.assert_close(found[0], found[1].detach())
    assert found[1].requires_grad


def test_create_graph_under_autocast_gives_the_same_gradient() -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    clustered = fused_dkm(weight, torch.randn(8), temperature=0.1, iterations=3)[0]
    expected = torch.autograd.grad(clustered.square().sum(), weight, retain_graph=True)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(clustered.square().sum(), weight, create_graph=True)[0]
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-4)
