"""What the fused layer refuses: what the plain one refuses, in its words, and what would take minutes."""

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


def test_a_step_of_minutes_is_refused_with_its_time() -> None:
    weight = torch.zeros(1).expand(4096, 4096)
    message = (
        r"16,777,216 weights in torch.float32, 256 centroids and 3 iterations would take about 129 s a step"
    )
    with pytest.raises(ValueError, match=message):
        fused_dkm(weight, torch.zeros(256), temperature=1.0, iterations=3)


def test_the_same_step_on_the_table_road_is_not() -> None:
    weight = torch.zeros(1).bfloat16().expand(4096, 4096)
    assert fused_dkm(weight, torch.zeros(256), temperature=1.0, iterations=3)[0].shape == weight.shape
