"""Clustered weights that FSDP2 shards are clustered, measured and palettized as whole ones are."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from bench.ranks import run_ranks
from edkm import Clustering, DKMConfig, PaletteError, cluster, palettize
from edkm.init import starting_centroids
from edkm.shards import shard_of, squared_sums, whole
from tests.edkm.models import TinyLM, loss_of, tokens

CONFIG = DKMConfig(bits=3, embedding_bits=5, num_steps=4)


def both(rank: int, *, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """Return a model, alike on all ranks and with sides that do not part evenly, and a copy of it."""
    torch.manual_seed(7)
    model = TinyLM(width=15, hidden=25).to(dtype)
    return model, copy.deepcopy(model)


def shard(model: nn.Module) -> None:
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model, reshard_after_forward=True)


def sharded_and_plain(
    rank: int, dtype: torch.dtype = torch.float32
) -> tuple[tuple[nn.Module, Clustering], tuple[nn.Module, Clustering]]:
    model, plain = both(rank, dtype=dtype)
    pair = (model, cluster(model, CONFIG)), (plain, cluster(plain, CONFIG))
    shard(model)
    return pair


def check_training(rank: int) -> None:
    """Steps on the same batch on every rank, whose mean gradient is that of one rank."""
    runs = sharded_and_plain(rank)
    optimizers = [
        torch.optim.AdamW(clustering.parameter_groups(0.02), betas=(0.9, 0.95)) for _, clustering in runs
    ]
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    assert rates[0] == pytest.approx(rates[1], rel=1e-6)
    for _ in range(3):
        batch = tokens()
        losses, norms = [], []
        for (model, clustering), optimizer in zip(runs, optimizers, strict=True):
            loss = loss_of(model, batch)
            loss.backward()
            losses.append(float(loss.detach()))
            norms.append(float(clustering.clip_grad_norm_(0.5)))
            assert float(clustering.clip_grad_norm_(1e9)) == pytest.approx(min(0.5, norms[-1]), rel=1e-4)
            optimizer.step()
            optimizer.zero_grad()
            clustering.step()
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    (model, clustering), (plain, reference) = runs
    assert clustering.num_dead_centroids() == reference.num_dead_centroids()
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, plain.get_buffer(name), rtol=1e-4, atol=1e-6)
        others = [torch.empty_like(buffer) for _ in range(dist.get_world_size())]
        dist.all_gather(others, buffer)
        assert all(torch.equal(buffer, other) for other in others), name


def check_evaluation_and_palettes(rank: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        (model, clustering), (plain, reference) = sharded_and_plain(rank, dtype)
        batch = tokens()
        with torch.no_grad():
            for mode in ("soft", "snapped"):
                with getattr(clustering, mode)(), getattr(reference, mode)():
                    assert torch.equal(model(batch), plain(batch)), mode
        palettize(model)
        palettize(plain)
        for name, value in plain.named_buffers():
            assert torch.equal(model.get_buffer(name), value), name


def check_starting_centroids(rank: int) -> None:
    torch.manual_seed(3)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for shape, options in (
            ((7, 33), {}),
            ((1, 40), {}),
            ((6, 32), {"num_groups": 3}),
            ((7, 32), {"vector_length": 2}),
        ):
            weight = torch.randn(shape).to(dtype)
            weight[0, :3] = torch.tensor([0.0, -0.0, 40.0])
            sharded = distribute_tensor(weight, mesh, [Shard(0)])
            found = starting_centroids(sharded, num_centroids=8, **options)
            assert torch.equal(found, starting_centroids(weight, num_centroids=8, **options)), (dtype, shape)
            assert torch.equal(whole(sharded), weight)
            assert shard_of(sharded).numel() < weight.numel() or rank == 0
            expected = float(weight.double().square().sum())
            assert squared_sums([sharded, weight]) == pytest.approx([expected] * 2, rel=1e-6)


def check_reading(rank: int) -> None:
    model, _ = both(rank)
    cluster(model, CONFIG)
    expected = model.layers[0].o_proj.weight
    shard(model)
    if rank == 0:
        for mode in (True, False):
            model.train(mode)
            with pytest.raises(
                PaletteError, match=r"of shape \[15, 15\]: this rank holds a shard; call unsh"
            ):
                model.layers[0].o_proj.weight  # noqa: B018 - the read is the test
    model.train()
    model.layers[0].unshard()
    if rank == 0:
        assert torch.equal(model.layers[0].o_proj.weight, expected)
    model.layers[0].reshard()
    late, _ = both(rank)
    shard(late)
    with pytest.raises(PaletteError, match="it is sharded over ranks already; call cluster first, then ful"):
        cluster(late, CONFIG)
    loss_of(late, tokens()).backward()


def check_bad_weights(rank: int) -> None:
    model, _ = both(rank)
    clustering = cluster(model, CONFIG)
    shard(model)
    if rank == 1:
        shard_of(model.layers[1].up_proj.parametrizations["weight"].original)[-1, -1] = torch.nan
    with pytest.raises(PaletteError, match=r"palettize layers\.1\.up_proj: .* are NaN"):
        palettize(model)
    assert clustering.parameter_groups(0.5)


def check_all(rank: int) -> None:
    check_reading(rank)
    check_training(rank)
    check_evaluation_and_palettes(rank)
    check_starting_centroids(rank)
    check_bad_weights(rank)


def test_shards_do_what_whole_weights_do() -> None:
    """One job for all of it: to start ranks takes longer than what they check."""
    run_ranks(f"{__name__}:check_all", num_ranks=3)


def test_a_clustering_of_nothing_trains_a_dense_model_in_the_same_units() -> None:
    model = TinyLM()
    dense = Clustering(model, {})
    clustered = cluster(copy.deepcopy(model), CONFIG)
    rates = [sorted(g["lr"] for g in each.parameter_groups(0.01)) for each in (dense, clustered)]
    assert rates[0] == rates[1]
    before = [weight.clone() for weight in model.parameters()]
    with dense.soft(), dense.snapped():
        dense.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert dense.num_dead_centroids() == {}
