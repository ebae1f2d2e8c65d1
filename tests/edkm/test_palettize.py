"""Palettizing gives exactly the weights that evaluation ran on."""

import re

import pytest
import torch
from torch import nn

from edkm import DKMConfig, PaletteError, PalettizedEmbedding, PalettizedLinear, cluster, palettize
from edkm.init import starting_centroids
from tests.edkm.models import TinyLM, optimizer_of, tokens, train


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_groups": 2}, {"vector_length": 2}])
def test_it_is_the_model_that_evaluation_saw(dtype: torch.dtype, options: dict[str, int]) -> None:
    model = TinyLM()
    clustering = cluster(model, DKMConfig(bits=3, embedding_bits=5, num_steps=4, **options))
    train(model, clustering, optimizer=optimizer_of(clustering), batches=[tokens() for _ in range(3)])
    model.eval().to(dtype)
    batch = tokens()
    with torch.no_grad():
        expected = model(batch)
        weights = {name: model.get_submodule(name).weight for name in ("lm_head", "layers.1.down_proj")}
    bias = model.layers[1].down_proj.bias
    assert palettize(model) is model
    with torch.no_grad():
        assert torch.equal(model(batch), expected)
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
    assert isinstance(model.embed_tokens, PalettizedEmbedding)
    assert isinstance(model.lm_head, PalettizedLinear)
    assert model.embed_tokens.palette is model.lm_head.palette
    assert model.layers[1].down_proj.bias is bias


def test_a_dense_model_is_packed_by_k_means() -> None:
    model = TinyLM()
    weight = model.layers[0].up_proj.weight.detach().clone()
    palettize(model, DKMConfig(bits=3))
    centroids = starting_centroids(weight, num_centroids=8).flatten()
    expected = centroids[(weight.unsqueeze(-1) - centroids).abs().argmin(-1)]
    assert torch.equal(model.layers[0].up_proj.weight, expected)
    assert isinstance(model.embed_tokens, nn.Embedding)


def test_a_model_that_is_one_linear_is_replaced() -> None:
    model = nn.Linear(6, 4).eval()
    palettized = palettize(model, DKMConfig(bits=2))
    assert isinstance(palettized, PalettizedLinear)
    assert not palettized.training
    assert palettized.weight.unique().numel() <= 4


def test_a_dense_model_without_configuration_is_refused() -> None:
    with pytest.raises(PaletteError, match="the model is not clustered: cluster it first, or give"):
        palettize(TinyLM())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["layers.0.up_proj", "embed_tokens"])
def test_a_weight_that_training_broke_is_named(bad: float, name: str) -> None:
    model = TinyLM(tied=False)
    cluster(model, DKMConfig(embedding_bits=4))
    module = model.get_submodule(name)
    with torch.no_grad():
        module.parametrizations["weight"].original[0, 0] = bad
    message = rf"cannot palettize {re.escape(name)}: 1 of its \d+ values are NaN or infinite"
    with pytest.raises(PaletteError, match=message):
        palettize(model)
    model.eval()
    with pytest.raises(PaletteError, match=message):
        _ = module.weight
