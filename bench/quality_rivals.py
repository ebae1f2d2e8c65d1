"""What a user would pick instead of eDKM, each on a fresh copy of the dense model, at the same bits."""

import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from bench.rival import MISSING, PalettizerWeights
from edkm import Clustering, DKMConfig, palettize
from edkm.init import starting_centroids
from edkm.palette import Palette
from edkm.palettize import put_palette
from integrations.corpus import Corpus, Sampler
from integrations.evaluate import num_stored
from integrations.loss import summed_loss
from integrations.parallel import Replicated
from integrations.ranks import Ranks
from integrations.recipe import Recipe
from integrations.text import read_training_text
from integrations.train import Schedule, Training, Weights
from integrations.transformers import load_dense, load_tokenizer, model_context

_NUM_CALIBRATION_ROWS = 128
_MAX_ROUNDS = 100
_NUM_TICKS = 10_000
_SCALE_BITS = 32
"""A row's scale and zero, in 16 bits each."""


class LeftOutError(Exception):
    """Why a row cannot be measured here."""


@dataclass(frozen=True)
class Made:
    """A compressed model.

    Arguments:
        model: runs on its compressed weights.
        bits_per_weight: where its tensors do not show it.
        notes: what else to tell.
    """

    model: nn.Module
    bits_per_weight: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rival:
    """What each rival starts from.

    Arguments:
        recipe: whose model, text, bits, batches and learning rate it uses.
        seconds: to train.
    """

    recipe: Recipe
    seconds: float

    def model(self) -> Any:
        """Load a fresh dense model."""
        torch.manual_seed(self.recipe.seed)
        return load_dense(self.recipe.model, dtype=torch.float32)

    def corpus(self) -> Corpus:
        """Return the rows that eDKM trains on."""
        context = self.recipe.max_tokens(model_context(self.recipe.model))
        reading = read_training_text(self.recipe.data, load_tokenizer(self.recipe.model), context=context)
        return reading.corpus.hold_out(64)[0]


def rounded(rival: Rival) -> Made:
    """Round to the nearest of evenly spaced values from each row's least to its largest."""
    model, bits = rival.model(), rival.recipe.bits
    num_bits = num_dense = 0
    for _, linear in _decoder_linears(model):
        weight = linear.weight.detach()
        low = weight.amin(dim=1, keepdim=True).half().float()
        step = ((weight.amax(dim=1, keepdim=True) - low) / (2**bits - 1)).half().float()
        linear.weight.data = low + step * ((weight - low) / step).round().clamp(0, 2**bits - 1)
        num_bits += bits * weight.numel() + _SCALE_BITS * weight.shape[0]
        num_dense += weight.numel()
    return _counted(model, rival, num_bits=num_bits, num_weights=num_dense)


def packed(rival: Rival) -> Made:
    """K-means of each weight, without training."""
    return Made(palettize(rival.model(), _config(rival)))


def sensitive(rival: Rival) -> Made:
    """K-means in which each weight counts by its mean squared gradient over rows of the training text."""
    model = rival.model()
    linears = dict(_decoder_linears(model))
    squares = {name: torch.zeros_like(linear.weight) for name, linear in linears.items()}
    rows = Sampler(rival.corpus(), batch_size=_NUM_CALIBRATION_ROWS, seed=rival.recipe.seed).batch()
    for row in rows:
        model.zero_grad()
        summed_loss(model, [row]).backward()  # type: ignore[no-untyped-call]
        for name, linear in linears.items():
            squares[name] += linear.weight.grad.square()
    for name, linear in linears.items():
        weight = linear.weight.detach()
        centroids = _k_means(weight, rival.recipe)
        for _ in range(_MAX_ROUNDS):
            centroids = _means(weight, centroids, counts=squares[name])
        put_palette(model, name, palette=Palette.snap(weight, centroids.unsqueeze(2)))
    return Made(palettize(model, _config(rival)), notes={"num_calibration_rows": len(rows)})


class StraightThrough(nn.Module):
    """A parametrization: the nearest centroid forward, the identity backward."""

    centroids: Tensor

    def __init__(self, weight: Tensor, *, recipe: Recipe) -> None:
        super().__init__()
        self.register_buffer("centroids", _k_means(weight.detach(), recipe))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the snapped weight, with the gradient of the dense one."""
        dense = weight.detach()
        snapped = self.centroids.gather(1, _nearest(dense, self.centroids)).view(dense.shape)
        return snapped + (weight - dense)


class StraightThroughWeights(Clustering):
    """Every step ends with a round of k-means, from the centroids that there are."""

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module]) -> None:
        super().__init__(model, {})
        self._layers = layers

    def step(self) -> None:
        """Move the centroids to the means of their weights."""
        for layer in self._layers.values():
            steps: Any = layer.parametrizations
            inner = steps.weight[0]
            inner.centroids.copy_(_means(steps.weight.original.detach(), inner.centroids))


def straight_through(rival: Rival) -> Made:
    """Train on snapped weights as if snapping had a slope of one; AdamW, batches and rates are eDKM's."""

    def attach() -> tuple[nn.Module, Weights]:
        model = rival.model()
        linears = dict(_decoder_linears(model))
        for linear in linears.values():
            register_parametrization(linear, "weight", StraightThrough(linear.weight, recipe=rival.recipe))
        return model, StraightThroughWeights(model, linears)

    model, notes = _trained(rival, attach)
    for name, linear in list(_decoder_linears(model)):
        steps: Any = linear.parametrizations
        palette = Palette.snap(steps.weight.original, steps.weight[0].centroids.unsqueeze(2))
        remove_parametrizations(linear, "weight")
        put_palette(model, name, palette=palette)
    return Made(palettize(model, _config(rival)), notes=notes)


def palettizer(rival: Rival) -> Made:
    """Train with `DKMPalettizer` of Core ML Tools, as its documentation shows it."""
    if importlib.util.find_spec("coremltools") is None:
        raise LeftOutError(MISSING)
    last: list[PalettizerWeights] = []

    def attach() -> tuple[nn.Module, Weights]:
        model = rival.model()
        names = [name for name, _ in _decoder_linears(model)]
        last[:] = [PalettizerWeights(model, names=names, bits=rival.recipe.bits)]
        return last[0].model, last[0]

    _, notes = _trained(rival, attach)
    model = last[0].finalized()
    weights = [linear.weight for _, linear in _decoder_linears(model)]
    num_weights = sum(weight.numel() for weight in weights)
    table_bits = 32 * 2**rival.recipe.bits * len(weights)
    num_bits = rival.recipe.bits * num_weights + table_bits
    made = _counted(model, rival, num_bits=num_bits, num_weights=num_weights)
    return Made(made.model, made.bits_per_weight, notes=notes)


@dataclass(frozen=True, kw_only=True)
class TimedSchedule(Schedule):
    """The rates of a run that lasts `seconds` on the clock, however many steps those hold.

    Arguments:
        num_steps: into which the time is divided.
        began: when, by `time.monotonic`.
        seconds: from then to the end.
    """

    began: float
    seconds: float

    @property
    def seconds_gone(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began

    def factor(self, num_done: int) -> float:
        """Return the learning rate of now, over its peak."""
        share = self.seconds_gone / self.seconds
        return super().factor(min(int(share * self.num_steps), self.num_steps - 1))


def _trained(
    rival: Rival, attach: Callable[[], tuple[nn.Module, Weights]]
) -> tuple[nn.Module, dict[str, Any]]:
    """Train for the rival's seconds; what is only done once, before the first step or in it, is in them."""
    recipe = rival.recipe
    schedule = TimedSchedule(_NUM_TICKS, recipe.learning_rate, began=time.monotonic(), seconds=rival.seconds)
    model, weights = attach()
    training = Training(
        model,
        weights,
        sampler=Sampler(rival.corpus(), batch_size=recipe.batch_size, seed=recipe.seed),
        schedule=schedule,
        parallel=Replicated(model, ranks=Ranks()),
    )
    training.step()
    while schedule.seconds_gone < rival.seconds:
        training.step()
    return model, {"num_steps": training.num_done, "training_seconds": round(schedule.seconds_gone, 1)}


def _counted(model: nn.Module, rival: Rival, *, num_bits: int, num_weights: int) -> Made:
    """Pack embedding and head of a model whose linears hold few values but lie dense, and count its bits."""
    overrides = {name: None for name, _ in _decoder_linears(model)}
    config = DKMConfig(
        bits=rival.recipe.bits, embedding_bits=rival.recipe.embedding_bits, overrides=overrides
    )
    packed_model = palettize(model, config)
    total, weights = num_stored(packed_model)
    return Made(packed_model, (8 * total - 32 * num_weights + num_bits) / weights)


def _config(rival: Rival) -> DKMConfig:
    recipe = rival.recipe
    return DKMConfig(bits=recipe.bits, embedding_bits=recipe.embedding_bits, num_groups=recipe.num_groups)


def _decoder_linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers." in name:
            yield name, module


def _k_means(weight: Tensor, recipe: Recipe) -> Tensor:
    """Centroids of each group of output channels, `[G, K]`, as many groups as eDKM has."""
    num_groups = math.gcd(recipe.num_groups, weight.shape[0])
    return starting_centroids(weight, num_centroids=2**recipe.bits, num_groups=num_groups).squeeze(2)


def _nearest(weight: Tensor, centroids: Tensor) -> Tensor:
    """The index of each weight's nearest centroid in its group, `[G, N]`."""
    groups = weight.reshape(len(centroids), -1)
    return torch.searchsorted((centroids[:, 1:] + centroids[:, :-1]) / 2, groups)


def _means(weight: Tensor, centroids: Tensor, counts: Tensor | None = None) -> Tensor:
    """Weighted mean of the weights nearest to each centroid, sorted; itself where there are none."""
    nearest = _nearest(weight, centroids)
    wide = weight.reshape(nearest.shape).double()
    mass = torch.ones_like(wide) if counts is None else counts.reshape(nearest.shape).double()
    sums = torch.zeros_like(centroids, dtype=torch.float64).scatter_add_(1, nearest, mass * wide)
    total = torch.zeros_like(sums).scatter_add_(1, nearest, mass)
    moved = torch.where(total > 0, sums / total, centroids.double())
    return moved.to(centroids.dtype).sort(dim=1).values
