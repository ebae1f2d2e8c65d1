"""What the fused layer refuses: what the plain one refuses, in its words, and what would take too long."""

import pytest
import torch

from edkm import dkm, fused_dkm


@pytest.mark.parametrize(
    ("weight", "centroids", "options"),
    [
        (torch.zeros(4, dtype=torch.int32), torch.zeros(2), {}),
        (torch.zeros(4, dtype=torch.complex64), torch.zeros(2), {}),
        (torch.zeros(4), torch.zeros(2, dtype=torch.int64), {}),
        (torch.zeros(3, 3), torch.zeros(2, 2), {}),
        (torch.zeros(5, 4).bfloat16(), torch.zeros(2, 8, 1), {}),
        (torch.zeros(()), torch.zeros(4, 2), {}),
        (torch.zeros(4), torch.zeros(0), {}),
        (torch.zeros(4), torch.zeros(1, 2, 3, 4), {}),
        (torch.zeros(4), torch.zeros(2), {"temperature": 0.0}),
        (torch.zeros(4), torch.zeros(2), {"temperature": float("nan")}),
        (torch.zeros(4), torch.zeros(2), {"iterations": 0}),
        (torch.zeros(4), torch.zeros(2), {"epsilon": -1.0}),
    ],
)
def test_it_refuses_what_dkm_refuses_in_its_words(
    weight: torch.Tensor, centroids: torch.Tensor, options: dict[str, float]
) -> None:
    options = {"temperature": 1.0, "iterations": 1} | options
    with pytest.raises((TypeError, ValueError)) as plain:
        dkm(weight, centroids, **options)
    with pytest.raises(plain.type) as fused:
        fused_dkm(weight, centroids, **options)
    assert str(fused.value) == str(plain.value)


def test_several_temperatures() -> None:
    with pytest.raises(ValueError, match=r"temperature of shape \[2, 1, 1\]: give one number, or use dkm"):
        fused_dkm(torch.zeros(4), torch.zeros(2, 3, 1), temperature=torch.ones(2, 1, 1), iterations=1)


@pytest.mark.parametrize(
    ("shape", "num_centroids", "said"),
    [
        ((4096, 4096), 256, r"16,777,216 weights in torch.float32, 256 .* 3 iterations .* 172 s a step"),
        ((512, 512), 256, r"256 .* 3 s a step: .* DKMConfig\(table_dtype='bfloat16'\)"),
        ((1 << 14, 1 << 14), 16, "16 centroids .* 172 s a step"),
    ],
)
def test_a_step_that_takes_too_long_is_refused_with_its_time(
    shape: tuple[int, int], num_centroids: int, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        fused_dkm(torch.zeros(1).expand(shape), torch.zeros(num_centroids), temperature=1.0, iterations=3)


def test_the_same_step_on_the_table_road_is_not() -> None:
    weight = torch.zeros(1).bfloat16().expand(4096, 4096)
    assert fused_dkm(weight, torch.zeros(256), temperature=1.0, iterations=3)[0].shape == weight.shape
