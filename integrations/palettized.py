"""Palettized model directories: written, loaded, packed without training, and turned dense again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from edkm import (
    DKMConfig,
    PaletteError,
    PalettizedEmbedding,
    PalettizedLinear,
    load_palettized,
    palettize,
    save_palettized,
)
from integrations.directory import disk_bytes, filled_whole, is_palettized, require_vacant
from integrations.errors import CommandError, told_as_command_error
from integrations.transformers import HubTokenizer, empty_model, load_dense, load_tokenizer, require_model


def load_model(name: str) -> transformers.PreTrainedModel:
    """A model in evaluation mode, from a dense directory, a hub name or a palettized directory.

    Raises:
        CommandError: there is no such model, or its files are damaged.
    """
    directory = Path(name)
    if not is_palettized(directory):
        return load_dense(name)
    model = empty_model(directory)
    with told_as_command_error(PaletteError):
        load_palettized(directory, into=model)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def write_palettized(
    model: transformers.PreTrainedModel, *, tokenizer: HubTokenizer, directory: Path
) -> None:
    """Write a palettized model with its configuration and tokenizer.

    Raises:
        CommandError: it cannot be written; nothing of it is left.
    """
    with filled_whole(directory) as partial:
        save_palettized(model, partial)
        model.config.save_pretrained(partial)
        tokenizer.save(partial)


def write_dense(model: transformers.PreTrainedModel, *, tokenizer: HubTokenizer, directory: Path) -> None:
    """Write an ordinary model directory.

    Raises:
        CommandError: it cannot be written; nothing of it is left.
    """
    with filled_whole(directory) as partial:
        model.save_pretrained(partial)
        tokenizer.save(partial)


def palettize_directory(
    name: str, output: Path, *, bits: int, embedding_bits: int | None, num_groups: int = 1
) -> dict[str, Any]:
    """Pack a dense model by k-means, without training.

    Arguments:
        name: model directory or hub name.
        output: directory to write; empty or new.
        bits: per weight of the decoder's linears.
        embedding_bits: per weight of embedding and output head; None leaves them dense.
        num_groups: equal parts of a decoder linear's output channels, with a table each.

    Returns:
        `output` and `disk_bytes`.

    Raises:
        CommandError: the model cannot be read or packed, or the output not written.
    """
    require_vacant(output)
    with told_as_command_error(ValueError):
        config = DKMConfig(bits=bits, embedding_bits=embedding_bits, num_groups=num_groups)
    require_model(name)
    tokenizer = load_tokenizer(name)
    model = load_dense(name)
    with told_as_command_error(PaletteError):
        palettize(model, config)
    write_palettized(model, tokenizer=tokenizer, directory=output)
    return {"output": str(output), "disk_bytes": disk_bytes(output)}


def export_dense(directory: Path, output: Path) -> dict[str, Any]:
    """Turn a palettized directory into an ordinary one with the same weights, dense.

    Arguments:
        directory: palettized.
        output: directory to write; empty or new.

    Returns:
        `output` and `disk_bytes`.

    Raises:
        CommandError: the model is not palettized or damaged, or the output cannot be written.
    """
    require_vacant(output)
    if not is_palettized(directory):
        raise CommandError(f"{directory} is not a palettized directory: there is nothing to make dense")
    tokenizer = load_tokenizer(str(directory))
    state = _dense_state(load_model(str(directory)))
    dense = empty_model(directory)
    dense.load_state_dict(state, assign=True)
    dense.tie_weights()
    write_dense(dense, tokenizer=tokenizer, directory=output)
    return {"output": str(output), "disk_bytes": disk_bytes(output)}


def _dense_state(model: nn.Module) -> dict[str, torch.Tensor]:
    state = {name: value for name, value in model.state_dict().items() if ".palette." not in name}
    for name, module in model.named_modules():
        if isinstance(module, PalettizedLinear | PalettizedEmbedding):
            state[f"{name}.weight"] = module.weight
    return state
