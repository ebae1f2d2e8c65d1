"""Over a weight in chunks: the same figures, and no temporary as large as the weight."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from edkm import DKMConfig, cluster, palettize
from edkm.chunks import num_not_finite, squared_sum, variance

SIZES = [1, 5, 1 << 18, (1 << 19) + 3]


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest storage that an operator returns."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.num_bytes = max(self.num_bytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_variance_is_that_of_float64(dtype: torch.dtype, size: int) -> None:
    weight = (torch.randn(size) * 0.02 + 0.5).to(dtype)
    exact = weight.double().var(correction=0)
    wide = torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(variance(weight, wide).double(), exact, rtol=1e-5, atol=1e-12)


def test_a_variance_in_the_weights_own_dtype_is_torchs() -> None:
    weight = torch.randn(1000, 700)
    assert torch.equal(variance(weight, torch.float32), weight.var(correction=0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_squared_sum_is_that_of_float64(dtype: torch.dtype, size: int) -> None:
    tensor = torch.randn(size).to(dtype)
    exact = tensor.double().square().sum()
    torch.testing.assert_close(squared_sum(tensor), exact, rtol=1e-6, atol=0)


def test_values_that_are_not_finite_are_counted_wherever_they_stand() -> None:
    tensor = torch.zeros(SIZES[-1], dtype=torch.bfloat16)
    assert int(num_not_finite(tensor)) == 0
    tensor[0], tensor[1 << 18], tensor[-1] = torch.nan, torch.inf, -torch.inf
    assert int(num_not_finite(tensor)) == 3
    assert int(num_not_finite(tensor[:0])) == 0


@pytest.mark.parametrize("bits", [3, 8])
def test_no_temporary_of_a_16_bit_weight_is_wider_than_the_weight(bits: int) -> None:
    linear = nn.Linear(2048, 2048, bias=False, dtype=torch.bfloat16)
    with Largest() as largest:
        clustering = cluster(linear, DKMConfig(bits=bits))
        (linear(torch.ones(1, 2048, dtype=torch.bfloat16)).sum()).backward()
        clustering.clip_grad_norm_(1.0)
        clustering.step()
        palettize(linear)
    assert largest.num_bytes <= 2 * 2048 * 2048
