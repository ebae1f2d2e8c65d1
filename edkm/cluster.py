"""Attach clustering to a model, as a parametrization of its weights."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList, register_parametrization

from edkm.clustering import Clustering
from edkm.config import DKMConfig
from edkm.errors import PaletteError
from edkm.palettized import PalettizedEmbedding, PalettizedLinear
from edkm.parametrization import ClusteredWeight
from edkm.selection import choose


def cluster(model: nn.Module, config: DKMConfig) -> Clustering:
    """Train a model on clustered weights from here on; starting centroids are found by k-means.

    Linears are clustered in training. Embeddings and the output head (what `get_output_embeddings` returns,
    or the last linear shaped like an embedding) train dense and are snapped in evaluation. In evaluation mode
    snapped weights carry no gradient.

    Arguments:
        model: changed in place; parameters stay the same objects. Its state, centroids included, is in its
            `state_dict`: to resume, cluster a model of the same shape with the same configuration and load
            it.
        config: which weights, and how.

    Returns:
        The handle to train with.

    Raises:
        PaletteError: nothing to cluster, clustered already, a weight that is NaN or infinite, sharded over
            ranks already, or one that the configuration does not fit; nothing is changed then.
    """
    if clustered_weights(model):
        raise PaletteError("the model is clustered already: palettize it, or cluster a fresh one")
    choices = choose(model, config)
    if not choices:
        raise PaletteError("the model has no weight to cluster: the configuration leaves all of them dense")
    attached = {}
    for choice in choices:
        name = " = ".join(choice.names)
        parametrization = ClusteredWeight(
            choice.weight, bits=choice.bits, config=config, trained_soft=choice.trained_soft, name=name
        )
        for module in choice.modules:
            # Unsafe spares the check's three passes, nothing else: shape and dtype stay.
            register_parametrization(module, "weight", parametrization, unsafe=True)
            parametrization.train(model.training)
        attached[name] = (parametrization, _steps(choice.modules[0]))
    guard_save_pretrained(model)
    return Clustering(model, attached)


def clustered_weights(model: nn.Module) -> dict[str, tuple[ClusteredWeight, nn.Parameter]]:
    """Parametrization and dense weight of each clustered module, by the module's name; ties repeat."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        parametrizations = getattr(module, "parametrizations", None)
        if isinstance(parametrizations, nn.ModuleDict) and "weight" in parametrizations:
            steps = _steps(module)
            if isinstance(steps[0], ClusteredWeight):
                assert isinstance(steps.original, nn.Parameter)
                found[name] = (steps[0], steps.original)
    return found


def _steps(module: nn.Module) -> ParametrizationList:
    steps = module.parametrizations["weight"]  # type: ignore[index]
    assert isinstance(steps, ParametrizationList)
    return steps


def guard_save_pretrained(model: nn.Module) -> None:
    """Make `save_pretrained`, where a model or a part of it has one, refuse while any of its weights is on a
    palette.

    What it would write has names that `from_pretrained` does not know, and fills with random weights.
    """
    for module in model.modules():
        if hasattr(type(module), "save_pretrained") and "save_pretrained" not in vars(module):
            vars(module)["save_pretrained"] = MethodType(_save_pretrained, module)


def _save_pretrained(self: Any, *arguments: Any, **options: Any) -> Any:
    palettized = any(isinstance(m, PalettizedLinear | PalettizedEmbedding) for m in self.modules())
    if palettized or clustered_weights(self):
        raise PaletteError(
            f"save_pretrained of a clustered {type(self).__name__} would write names that load as random "
            "weights: use save_palettized, or write its decoded weights as an ordinary model"
        )
    return type(self).save_pretrained(self, *arguments, **options)
