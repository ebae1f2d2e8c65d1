"""Snap a model: every clustered weight becomes a table and packed indices."""

from __future__ import annotations

from typing import cast

from torch import nn

from edkm.cluster import cluster, clustered_weights, guard_save_pretrained
from edkm.config import DKMConfig
from edkm.errors import PaletteError
from edkm.palette import Palette
from edkm.palettized import PalettizedEmbedding, PalettizedLinear


def palettize(model: nn.Module, config: DKMConfig | None = None) -> nn.Module:
    """Replace clustered modules by ones that run from a palette: exactly the weights that evaluation ran on.

    Weights that FSDP shards are gathered one after the other, and every rank, all of which call it, gets the
    same palettes. What stays dense stays sharded, and the model is to be saved, not run: FSDP's hooks still
    gather weights that it no longer runs on.

    Arguments:
        model: clustered, or dense with a `config`; changed in place.
        config: cluster a dense model by k-means without training first.

    Returns:
        The model, or what replaces it where it is itself a clustered module.

    Raises:
        PaletteError: the model is not clustered and there is no `config`, or is and there is one; or what
            `cluster` raises; or a weight has become NaN or infinite.
    """
    if config is not None:
        cluster(model, config)
    clustered = clustered_weights(model)
    if not clustered:
        raise PaletteError("the model is not clustered: cluster it first, or give palettize a DKMConfig")
    palettes: dict[int, Palette] = {}
    for parametrization, weight in clustered.values():
        if id(weight) not in palettes:
            palettes[id(weight)] = parametrization.palette(weight)
    for name, (_, weight) in clustered.items():
        model = put_palette(model, name, palette=palettes[id(weight)])
    guard_save_pretrained(model)
    return model


def put_palette(model: nn.Module, name: str, *, palette: Palette) -> nn.Module:
    """Make a linear or an embedding run from a palette; returns the model, or what replaces it."""
    module = model.get_submodule(name)
    palettized: nn.Module
    if isinstance(module, nn.Embedding):
        palettized = PalettizedEmbedding(palette, padding_idx=module.padding_idx)
    else:
        palettized = PalettizedLinear(palette, cast("nn.Parameter | None", module.bias))
    palettized.train(module.training)
    if not name:
        return palettized
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, palettized)
    return model
