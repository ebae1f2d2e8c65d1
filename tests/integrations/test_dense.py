"""The dense control is trained in the units of a clustered model."""

import torch
from torch import nn

from integrations.dense import DenseWeights


def model() -> nn.Module:
    layers = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False))
    layers[0].bias.requires_grad_(False)
    return layers


def test_learning_rates_are_fractions_of_the_rms() -> None:
    dense = model()
    groups = DenseWeights(dense).parameter_groups(0.01, weight_decay=0.5)
    assert [group["params"][0] is weight for group, weight in zip(groups, _weights(dense), strict=True)]
    for group, weight in zip(groups, _weights(dense), strict=True):
        rms = weight.detach().double().square().mean().sqrt()
        torch.testing.assert_close(torch.tensor(group["lr"]).double(), 0.01 * rms, rtol=1e-6, atol=0)
        torch.testing.assert_close(group["lr"] * group["weight_decay"], 0.005, rtol=1e-6, atol=0)
        torch.testing.assert_close(group["lr"] * group["eps"], 1e-14, rtol=1e-6, atol=0)


def test_a_weight_of_zeros_has_the_rate_as_it_is() -> None:
    dense = nn.Linear(3, 3)
    nn.init.zeros_(dense.bias)
    assert DenseWeights(dense).parameter_groups(0.25)[1]["lr"] == 0.25


def test_the_clipped_norm_does_not_see_the_scale_of_a_weight() -> None:
    dense = model()
    rms = [weight.detach().double().square().mean().sqrt() for weight in _weights(dense)]
    weights = DenseWeights(dense)
    for weight in _weights(dense):
        weight.grad = 10 * torch.randn_like(weight)
    before = [weight.grad.clone() for weight in _weights(dense)]
    weights.clip_grad_norm_(1.0)
    after = [weight.grad for weight in _weights(dense)]
    norm = torch.stack([g.double().norm() * r for g, r in zip(after, rms, strict=True)]).norm()
    torch.testing.assert_close(norm, torch.ones((), dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(after[0] / before[0], (after[1] / before[1]).mean().expand(7, 5))
    unclipped = [gradient.clone() for gradient in after]
    weights.clip_grad_norm_(2.0)
    assert all(torch.equal(g, u) for g, u in zip(after, unclipped, strict=True))


def test_soft_and_snapped_are_the_weights_themselves() -> None:
    dense = model()
    weights = DenseWeights(dense)
    before = [weight.clone() for weight in dense.parameters()]
    with weights.soft(), weights.snapped():
        weights.step()
    assert all(torch.equal(a, b) for a, b in zip(before, dense.parameters(), strict=True))
    assert weights.num_dead_centroids() == {}


def _weights(dense: nn.Module) -> list[nn.Parameter]:
    return [dense[0].weight, dense[1].weight]
