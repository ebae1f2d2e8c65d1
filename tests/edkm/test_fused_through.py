"""Wider weights clustered as if cast to 16 bits; the gradient goes straight through."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from edkm import DKMConfig, cluster, dkm
from edkm.fused import fused_through

WIDE = [torch.float32, torch.float64]
NARROW = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("table_dtype", NARROW, ids=str)
@pytest.mark.parametrize(("shape", "groups"), [((40, 33), 1), ((4, 100_001), 2)], ids=str)
def test_it_is_dkm_of_the_rounded_weight(
    dtype: torch.dtype, table_dtype: torch.dtype, shape: tuple[int, int], groups: int
) -> None:
    weight = (torch.randn(shape, dtype=dtype) * 0.02).requires_grad_()
    centroids = (torch.randn(groups, 4, 1, dtype=dtype) * 0.03).requires_grad_()
    incoming = torch.randn(shape, dtype=dtype)
    mine = fused_through(weight, centroids, temperature=1e-4, iterations=2, table_dtype=table_dtype)
    assert mine[0].dtype == dtype
    found = torch.autograd.grad(mine[0], (weight, centroids), incoming)
    rounded = weight.detach().to(table_dtype).double().requires_grad_()
    starts = centroids.detach().double().requires_grad_()
    exact = dkm(rounded, starts, temperature=1e-4, iterations=2)
    expected = torch.autograd.grad(exact[0], (rounded, starts), incoming.double())
    for one, other in zip((*mine, *found), (*exact, *expected), strict=True):
        error = float((one.double() - other).detach().norm() / other.detach().norm())
        assert error < (1e-6 if dtype == torch.float32 else 1e-10)


def test_where_there_is_no_table_nothing_is_rounded() -> None:
    weight = torch.randn(8, 8)
    options = {"temperature": 0.1, "iterations": 2}
    for centroids in (torch.randn(8, 2, 1), torch.randn(3, 2)):
        mine = fused_through(weight, centroids, table_dtype=torch.bfloat16, **options)
        plain = fused_through(weight, centroids, table_dtype=None, **options)
        assert all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True))


def test_second_order_sees_the_rounded_weight() -> None:
    weight = torch.randn(6, 6, requires_grad=True)
    clustered, _ = fused_through(
        weight, torch.tensor([-1.0, 1.0]), temperature=0.3, iterations=1, table_dtype=torch.bfloat16
    )
    first = [
        torch.autograd.grad(clustered.sum(), weight, create_graph=graph, retain_graph=True)[0]
        for graph in (False, True)
    ]
    torch.testing.assert_close(first[0], first[1].detach(), rtol=1e-5, atol=1e-6)
    assert torch.autograd.grad(first[1].sum(), weight)[0].isfinite().all()


def test_an_option_of_the_configuration() -> None:
    saved: list[torch.Tensor] = []
    linear = nn.Linear(64, 64)
    cluster(linear, DKMConfig(bits=3, table_dtype="bfloat16"))
    weight = linear.parametrizations["weight"].original
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        clustered = linear.weight
    assert sum(each is weight for each in saved) == 1
    assert sum(each.nbytes for each in saved if each is not weight) < 1000
    with torch.no_grad():
        weight.copy_(weight.bfloat16())
    # All but the temperature, whose variance is the dense weight's.
    torch.testing.assert_close(linear.weight, clustered, rtol=1e-3, atol=1e-4)
