"""AdamW in bfloat16 alone goes where AdamW on fp32 masters goes."""

import pytest
import torch
from torch import nn

from integrations.compensated import CompensatedAdamW
from integrations.optimizer import MasterAdamW

_SIZE = (1 << 18) + 77


def test_small_updates_of_one_sign_move_every_weight() -> None:
    weight = nn.Parameter((0.02 * torch.randn(_SIZE)).bfloat16())
    before = weight.detach().clone()
    optimizer = CompensatedAdamW([{"params": [weight], "lr": 5e-5}])
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step(1.0)
    moved = before.double() - weight.detach().double()
    assert bool((moved > 0).all())
    spacing = torch.finfo(torch.bfloat16).eps * before.double().abs().clamp(min=1e-3)
    assert bool(((moved - 20 * 5e-5).abs() <= 2e-5 + spacing).all())


def test_it_follows_masters() -> None:
    start = (0.02 * torch.randn(64, 128)).bfloat16()
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": 1e-4, "eps": 1e-10, "weight_decay": 0.1}
    optimizers = [
        optimizer([{"params": [each], **options}])
        for optimizer, each in ((CompensatedAdamW, ours), (MasterAdamW, theirs))
    ]
    for step in range(60):
        ours.grad = (torch.randn_like(start, dtype=torch.float32) + 0.5).bfloat16()
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step(1 - step / 60)
        assert ours.grad is None
    moved = theirs.detach().double() - start.double()
    apart = ours.detach().double() - theirs.detach().double()
    assert float(apart.norm() / moved.norm()) < 0.05


def test_it_keeps_six_bytes_a_weight() -> None:
    weight = nn.Parameter(torch.zeros(300, 100, dtype=torch.bfloat16))
    optimizer = CompensatedAdamW([{"params": [weight], "lr": 0.1}])
    (state,) = optimizer._states.values()
    assert sum(each.untyped_storage().nbytes() for each in vars(state).values()) == 6 * weight.numel()


def test_a_weight_without_gradient_stays() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    CompensatedAdamW([{"params": [weight], "lr": 0.1, "weight_decay": 0.5}]).step(1.0)
    assert bool((weight == 1).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_widths_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"a parameter of torch\.float\d+: give bfloat16; MasterAdamW takes"):
        CompensatedAdamW([{"params": [nn.Parameter(torch.ones(3, dtype=dtype))], "lr": 0.1}])
