"""Steps, learning rates and norms in units of each weight, soft and snapped losses, dead centroids."""

import copy
import math

import pytest
import torch
from torch import nn

from edkm import DKMConfig, cluster
from tests.edkm.models import TinyLM, loss_of, optimizer_of, tokens, train


def test_learning_rates_are_relative_to_each_weight() -> None:
    model = TinyLM()
    clustering = cluster(model, DKMConfig())
    groups = clustering.parameter_groups(0.01, weight_decay=0.1)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in model.parameters()}
    for group in groups:
        rms = float(group["params"][0].detach().double().square().mean().sqrt())
        assert group["lr"] == pytest.approx(0.01 * rms)
        assert group["lr"] * group["weight_decay"] == pytest.approx(0.01 * 0.1)


def test_a_frozen_weight_is_left_out_and_a_zero_one_is_not_stuck() -> None:
    linear = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    linear[0].weight.requires_grad_(False)
    nn.init.zeros_(linear[1].bias)
    clustering = cluster(linear, DKMConfig())
    groups = clustering.parameter_groups(0.01)
    assert len(groups) == 3
    assert all(group["lr"] > 0 for group in groups)


def test_the_norm_is_that_of_gradients_in_units_of_their_weights() -> None:
    model = TinyLM()
    clustering = cluster(model, DKMConfig())
    assert float(clustering.clip_grad_norm_(1.0)) == 0.0
    loss_of(model, tokens()).backward()
    relative = [
        p.grad.double().norm() * p.detach().double().square().mean().sqrt() for p in model.parameters()
    ]
    expected = float(torch.stack(relative).norm())
    before = [p.grad.clone() for p in model.parameters()]
    assert float(clustering.clip_grad_norm_(2 * expected)) == pytest.approx(expected, rel=1e-5)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    clustering.clip_grad_norm_(expected / 4)
    assert float(clustering.clip_grad_norm_(1.0)) == pytest.approx(expected / 4, rel=1e-4)


@pytest.mark.parametrize("scale", [1 / 16, 16])
def test_scaling_up_and_down_trains_to_the_same_perplexity(scale: float) -> None:
    plain = TinyLM()
    scaled = copy.deepcopy(plain)
    with torch.no_grad():
        for layer in scaled.layers:
            layer.up_proj.weight *= scale
            layer.down_proj.weight /= scale
    batches = [tokens(8, 16) for _ in range(40)]
    held_out = tokens(32, 16)
    losses = []
    for model in (plain, scaled):
        clustering = cluster(model, DKMConfig(bits=3, num_steps=40))
        run = train(model, clustering, optimizer=optimizer_of(clustering, 0.05), batches=batches)
        assert run[-1] < 0.7 * run[0]
        with torch.no_grad():
            losses.append(float(loss_of(model.eval(), held_out)))
    assert math.exp(losses[1] - losses[0]) == pytest.approx(1.0, abs=0.01)


def test_soft_and_snapped_weights_can_be_chosen_in_any_mode() -> None:
    model = TinyLM()
    clustering = cluster(model, DKMConfig(bits=2, embedding_bits=3, temperature=0.5, final_temperature=0.5))
    batch = tokens()
    with torch.no_grad():
        soft, snapped = model(batch), model.eval()(batch)
        assert not torch.equal(soft, snapped)
        for mode in (True, False):
            model.train(mode)
            with clustering.soft():
                assert torch.equal(model(batch), soft)
                with clustering.snapped():
                    assert torch.equal(model(batch), snapped)
                assert torch.equal(model(batch), soft)
        assert torch.equal(model(batch), snapped)
    with clustering.soft():
        model(batch).sum().backward()
    assert model.layers[0].o_proj.parametrizations["weight"].original.grad is not None


def test_a_choice_ends_with_an_exception() -> None:
    model = TinyLM().eval()
    clustering = cluster(model, DKMConfig())
    before = model(tokens(1, 4).zero_())
    with pytest.raises(KeyError), clustering.soft():
        raise KeyError
    assert torch.equal(model(tokens(1, 4).zero_()), before)


def test_soft_and_snapped_meet_as_the_temperature_falls() -> None:
    model = TinyLM()
    clustering = cluster(model, DKMConfig(bits=3, num_steps=40))
    batches = [tokens(8, 16) for _ in range(40)]
    train(model, clustering, optimizer=optimizer_of(clustering), batches=batches)
    with torch.no_grad():
        with clustering.soft():
            soft = float(loss_of(model, batches[0]))
        with clustering.snapped():
            snapped = float(loss_of(model, batches[0]))
    assert snapped == pytest.approx(soft, rel=0.05)


def test_dead_centroids_are_counted() -> None:
    model = TinyLM()
    with torch.no_grad():
        model.layers[0].o_proj.weight.copy_(torch.randint(0, 3, (16, 16)) - 1.0)
    dead = cluster(model, DKMConfig(bits=3, embedding_bits=8)).num_dead_centroids()
    assert dead["layers.0.o_proj"] == 5
    assert sum(dead.values()) == 5
    assert len(dead) == 8


def test_a_step_carries_the_centroids_of_the_forward_pass() -> None:
    model = nn.Linear(8, 8)
    clustering = cluster(model, DKMConfig(bits=2, temperature=0.3, final_temperature=0.1, num_steps=2))
    parametrization = model.parametrizations["weight"][0]
    before = parametrization.centroids.clone()
    model(torch.randn(2, 8)).sum().backward()
    assert torch.equal(parametrization.centroids, before)
    clustering.step()
    assert not torch.equal(parametrization.centroids, before)
    assert int(parametrization.num_steps_done) == 1
    moved = parametrization.centroids.clone()
    clustering.step()  # a weight that no forward pass used stays where it is
    assert torch.equal(parametrization.centroids, moved)
