"""`edkm finetune`: from a model and a text to a palettized directory."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from edkm import Clustering, DKMConfig, PaletteError, cluster, palettize
from integrations.checkpoint import Checkpoints
from integrations.corpus import Row, Sampler
from integrations.directory import disk_bytes, made_early, require_vacant
from integrations.errors import CommandError, told_as_command_error
from integrations.evaluate import held_out_loss
from integrations.loss import Distillation, Loss, summed_loss
from integrations.palettized import write_dense, write_palettized
from integrations.parallel import Parallel, Replicated, Sharded
from integrations.ranks import Ranks, joined_ranks
from integrations.recipe import Destination, Recipe
from integrations.shards import make_whole
from integrations.text import Reading, read_training_text
from integrations.train import Schedule, Training, Weights, train
from integrations.transformers import (
    HubTokenizer,
    load_dense,
    load_tokenizer,
    model_context,
    require_model,
)

_MAX_HELD_OUT_ROWS = 64
_MAX_GAP = 0.01


def finetune(recipe: Recipe, destination: Destination) -> dict[str, Any]:
    """Train a model on clustered weights and write it palettized; a dense control is written dense.

    Arguments:
        recipe: what to do.
        destination: where to leave it.

    Returns:
        What was read, held-out losses before and after, what the store held, what was written.

    Raises:
        CommandError: the input is bad, the loss is not finite, or the output cannot be written.
        InterruptedRunError: Ctrl-C or SIGTERM came and a checkpoint was written.
    """
    _config(recipe)
    require_model(recipe.model)
    with joined_ranks(recipe.device) as ranks:
        if ranks.is_first:
            _require_destination(destination)
        ranks.wait()
        with made_early(destination.output):
            return _finetune(recipe, destination=destination, ranks=ranks)


def _finetune(recipe: Recipe, *, destination: Destination, ranks: Ranks) -> dict[str, Any]:
    began = time.monotonic()
    context = recipe.max_tokens(model_context(recipe.model))
    tokenizer = load_tokenizer(recipe.model)
    reading = read_training_text(recipe.data, tokenizer, context=context, separator=recipe.separator)
    if ranks.is_first:
        _tell_cuts(reading, context=context)
    corpus, held_out = reading.corpus.hold_out(_MAX_HELD_OUT_ROWS)
    model = _load(recipe)
    loss_dense = held_out_loss(model, held_out)
    loss = _loss(model, recipe)
    weights = _weights(model, recipe)
    training = Training(
        model,
        weights,
        sampler=Sampler(corpus, batch_size=recipe.batch_size, seed=recipe.seed),
        schedule=Schedule(recipe.steps, recipe.learning_rate, num_accumulated=recipe.accumulate),
        parallel=_parallel(model, recipe, ranks=ranks),
        loss=loss,
    )
    notes = _train(training, recipe=recipe, destination=destination, held_out=held_out)
    after = training.held_out_losses(held_out)
    num_dead = sum(weights.num_dead_centroids().values())
    _write(model, recipe, tokenizer=tokenizer, directory=destination.output, ranks=ranks)
    if ranks.is_first:
        _warn_of_gap(after)
    return {
        "output": str(destination.output),
        "bits": None if recipe.dense else recipe.bits,
        "num_steps": recipe.steps,
        **_counts(reading, held_out),
        "held_out_loss_dense": loss_dense,
        "held_out_loss_before": notes["before"],
        "held_out_loss_after": after,
        "num_dead_centroids": num_dead,
        "saved_bytes": notes["saved_bytes"],
        "peak_held_bytes": notes["peak_held_bytes"],
        "disk_bytes": disk_bytes(destination.output),
        "seconds": round(time.monotonic() - began, 1),
    }


def _require_destination(destination: Destination) -> None:
    if not destination.resume or not destination.checkpoints.is_dir():
        require_vacant(destination.output)
    elif (destination.output / "config.json").exists():
        raise CommandError(f"{destination.output} is finished: there is nothing to resume")


def _tell_cuts(reading: Reading, *, context: int) -> None:
    if reading.num_truncated or reading.num_dropped:
        print(
            f"edkm: of {reading.num_rows} rows {reading.num_truncated} are cut off at {context} tokens "
            f"and {reading.num_dropped} have nothing to learn from within them",
            file=sys.stderr,
        )


def _counts(reading: Reading, held_out: Sequence[Row]) -> dict[str, int]:
    return {
        "num_rows": reading.num_rows,
        "num_held_out_rows": len(held_out),
        "num_truncated_rows": reading.num_truncated,
        "num_dropped_rows": reading.num_dropped,
    }


def _load(recipe: Recipe) -> PreTrainedModel:
    torch.manual_seed(recipe.seed)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "mixed": torch.float32}
    model = load_dense(recipe.model, dtype=dtypes.get(recipe.dtype))
    if model.dtype == torch.float16:
        # Gradients this small vanish in float16, and nothing here scales the loss.
        nn.Module.float(model)
    # A torch built without CUDA asserts.
    with told_as_command_error(RuntimeError, AssertionError):
        if torch.device(recipe.device).type == "meta":
            raise CommandError("--device meta computes nothing: name one that does, such as cpu")
        nn.Module.to(model, recipe.device)
    return model


def _loss(model: nn.Module, recipe: Recipe) -> Loss:
    # The teacher is the model as it came: copied before it is clustered, and before ranks part it.
    return Distillation(copy.deepcopy(model), fraction=recipe.distill) if recipe.distill else summed_loss


def _weights(model: nn.Module, recipe: Recipe) -> Weights:
    if recipe.dense:
        return Clustering(model, {})
    with told_as_command_error(PaletteError):
        return cluster(model, _config(recipe))


def _parallel(model: nn.Module, recipe: Recipe, *, ranks: Ranks) -> Parallel:
    is_mixed = recipe.dtype == "mixed"
    if recipe.parallel == "fsdp" and ranks.num_ranks > 1:
        return Sharded(model, ranks=ranks, dtype=torch.bfloat16 if is_mixed else None)
    return Replicated(model, ranks=ranks, autocast=is_mixed)


def _config(recipe: Recipe) -> DKMConfig:
    with told_as_command_error(ValueError):
        return DKMConfig(
            bits=recipe.bits,
            embedding_bits=recipe.embedding_bits,
            num_groups=recipe.num_groups,
            num_steps=recipe.steps,
        )


def _train(
    training: Training, *, recipe: Recipe, destination: Destination, held_out: Sequence[Row]
) -> dict[str, Any]:
    checkpoints = Checkpoints(
        destination.checkpoints,
        settings=recipe.settings(),
        num_kept=destination.checkpoints_kept,
        ranks=training.ranks,
    )
    state = checkpoints.load(training.state_dict()) if destination.resume else None
    if state is None:
        notes = {"before": training.held_out_losses(held_out)}
    else:
        training.load_state_dict(state)
        notes = state["notes"]
    train(
        training,
        num_steps=recipe.steps,
        checkpoints=checkpoints,
        interval=destination.checkpoint_interval,
        notes=notes,
    )
    return notes


def _write(
    model: PreTrainedModel, recipe: Recipe, *, tokenizer: HubTokenizer, directory: Path, ranks: Ranks
) -> None:
    """Write the result once, on the first rank; all ranks make it ready, and wait for it."""
    if not recipe.dense:
        with told_as_command_error(PaletteError):
            palettize(model)
    make_whole(model, keep=ranks.is_first)
    if ranks.is_first:
        write = write_dense if recipe.dense else write_palettized
        write(model, tokenizer=tokenizer, directory=directory)
    ranks.wait()


def _warn_of_gap(losses: Mapping[str, float]) -> None:
    soft, snapped = losses["soft"], losses["snapped"]
    if snapped > (1.0 + _MAX_GAP) * soft:
        print(
            f"edkm: warning: the held-out loss of the snapped weights, {snapped:.4f}, "
            f"is {snapped / soft - 1:.1%} above that of the soft ones, {soft:.4f}: train for more steps",
            file=sys.stderr,
        )
