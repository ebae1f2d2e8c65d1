"""No update is lost in a 16-bit weight, and AdamW is torch's own."""

import itertools
import math

import pytest
import torch
from torch import nn

from integrations.optimizer import MasterAdamW, cosine_factor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_small_updates_of_one_sign_move_every_weight(dtype: torch.dtype) -> None:
    weight = nn.Parameter((0.02 * torch.randn(4096)).to(dtype))
    before = weight.detach().clone()
    optimizer = MasterAdamW([{"params": [weight], "lr": 5e-5, "weight_decay": 0.0}])
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step(1.0)
    moved = before.double() - weight.detach().double()
    assert bool((moved > 0).all())
    spacing = torch.finfo(dtype).eps * before.double().abs().clamp(min=1e-3)
    assert bool(((moved - 20 * 5e-5).abs() <= 1e-5 + spacing).all())


def test_without_masters_weights_stand_still() -> None:
    """What the masters are for: torch's own AdamW on bf16."""
    weight = nn.Parameter((0.02 * torch.randn(4096)).bfloat16())
    before = weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], lr=5e-5, weight_decay=0.0)
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert float((weight == before).float().mean()) > 0.2


def test_wide_weights_take_torchs_own_steps() -> None:
    ours = nn.Parameter(torch.randn(31))
    theirs = nn.Parameter(ours.detach().clone())
    optimizer = MasterAdamW([{"params": [ours], "lr": 0.01, "weight_decay": 0.1}])
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(1, 5):
        factor = 1.0 / step
        ours.grad = torch.randn(31)
        theirs.grad = ours.grad.clone()
        reference.param_groups[0]["lr"] = 0.01 * factor
        optimizer.step(factor)
        reference.step()
        assert ours.grad is None
        assert torch.equal(ours, theirs)


def test_a_weight_without_gradient_stays() -> None:
    weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]
    optimizer = MasterAdamW([{"params": weights, "lr": 0.1, "weight_decay": 0.5}])
    optimizer.step(1.0)
    assert all(bool((weight == 1).all()) for weight in weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_loaded_state_goes_on_to_the_same_bits(dtype: torch.dtype) -> None:
    start = torch.randn(64).to(dtype)
    gradients = [torch.randn(64).to(dtype) for _ in range(6)]
    weights, optimizers = [], []
    for _ in range(2):
        weights.append(nn.Parameter(start.clone()))
        optimizers.append(MasterAdamW([{"params": [weights[-1]], "lr": 1e-3, "weight_decay": 0.0}]))
    for step, gradient in enumerate(gradients):
        if step == 3:
            weights[1].data.copy_(weights[0].data)
            state, now = (optimizer.state_dict() for optimizer in optimizers)
            for name in state.keys() - {"peaks"}:
                now[name].copy_(state[name])
            optimizers[1].load_state_dict(state)
        for index in (0, 1) if step >= 3 else (0,):
            weights[index].grad = gradient.clone()
            optimizers[index].step(0.5)
    assert torch.equal(weights[0], weights[1])


def test_the_rate_rises_then_falls_to_nothing() -> None:
    factors = [cosine_factor(step, num_steps=100, warmup_steps=5) for step in range(100)]
    assert factors[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[5:]))
    assert math.isclose(factors[52], 0.5 * (1 + math.cos(math.pi * 47 / 95)))
    assert 0 < factors[-1] < 1e-3
    assert cosine_factor(0, num_steps=1, warmup_steps=1) == 1.0
