"""Write a palettized model: safetensors and json, whole or not at all."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from edkm.cluster import clustered_weights
from edkm.errors import PaletteError
from edkm.manifest import Manifest
from edkm.palettized import PalettizedEmbedding, PalettizedLinear
from edkm.writer import Writer

# The most that is held beside the model, or its part, while it is written.
_SHARD_BYTES = 500_000_000


def save_palettized(
    model: nn.Module | Iterable[tuple[str, nn.Module]], directory: str | os.PathLike[str]
) -> None:
    """Write a palettized model's weights; tied ones once, nothing pickled.

    Writes `palettized.safetensors` (above 500 MB in several files, with an index) and, last,
    `palettized.json`. All are written to a folder inside of `directory` and then moved.

    Arguments:
        model: `palettize` made it. Or, for a model that does not fit whole, its parts: each with the name
            that the module has in the model, such as `model.layers.0`, made when it is asked for and let go
            of before the next one. The files are those of the whole model; ties between parts are not seen.
        directory: made when missing.

    Raises:
        PaletteError: nothing of the model is on a palette, some of it is still clustered or parametrized, or
            is no tensor that `load_palettized` reads.
        ValueError: two parts have a tensor of the same name.
        FileExistsError: the directory is not empty.
        OSError: writing failed, for instance on a full disk; nothing of it is left, as after an error in the
            making of a part.
    """
    if isinstance(model, nn.Module):
        _require_palettes(
            any(isinstance(each, PalettizedLinear | PalettizedEmbedding) for each in model.modules())
        )
    parts = [("", model)] if isinstance(model, nn.Module) else model
    save_parts(parts, Path(directory), shard_bytes=_SHARD_BYTES)


def save_parts(parts: Iterable[tuple[str, nn.Module]], directory: Path, *, shard_bytes: int) -> None:
    """Write parts of a model, in files of at most `shard_bytes` where one tensor allows."""
    whole = Manifest({}, {}, {})
    with Writer(directory, shard_bytes=shard_bytes) as writer:
        for prefix, part in parts:
            whole = whole.joined(_write(part, writer, prefix=prefix))
            # Else it would live until the next one is made; what clustering left of its dense weights lies in
            # cycles, whose size the collector does not know.
            del part
            gc.collect()
        _require_palettes(bool(whole.modules))
        writer.finish(whole)


def _write(part: nn.Module, writer: Writer, *, prefix: str) -> Manifest:
    """Write one part; `prefix` is its name in the model."""
    _require_loadable(part, prefix=prefix)
    modules: dict[str, str] = {}
    palettes: dict[int, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for inner, module in part.named_modules(remove_duplicate=False):
        if isinstance(module, PalettizedLinear | PalettizedEmbedding):
            name = _joined(prefix, inner)
            palette = palettes.setdefault(id(module.palette), name)
            modules[name] = palette
            if palette == name:
                shapes[name] = module.palette.shape
                writer.add(_joined(name, "palette.table"), module.palette.table)
                writer.add(_joined(name, "palette.indices"), module.palette.indices)
    return Manifest(shapes, modules, _write_dense(part, writer, prefix=prefix, modules=modules))


def _write_dense(
    part: nn.Module, writer: Writer, *, prefix: str, modules: Mapping[str, str]
) -> dict[str, str]:
    """Write what is not on a palette, each tensor once; returns the other names of those that are tied."""
    of_palettes = {_joined(name, f"palette.{leaf}") for name in modules for leaf in ("table", "indices")}
    names: dict[tuple[object, ...], str] = {}
    aliases: dict[str, str] = {}
    for inner, tensor in part.state_dict().items():
        name = _joined(prefix, inner)
        if name in of_palettes:
            continue
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else (name,)
        first = names.setdefault(key, name)
        if first == name:
            writer.add(name, tensor)
        else:
            aliases[name] = first
    return aliases


def _require_loadable(part: nn.Module, *, prefix: str) -> None:
    """Check that `load_palettized` will read what `part` has, before anything of it is written."""
    clustered = clustered_weights(part)
    for inner, tensor in part.state_dict().items():
        name = _joined(prefix, inner)
        module, parametrization, _ = f".{inner}".rpartition(".parametrizations.")
        if module[1:] in clustered and parametrization:
            raise PaletteError(
                f"cannot save {name}: its module is still clustered; palettize the model first"
            )
        if parametrization:
            raise PaletteError(
                f"cannot save {name}: a parametrization computes a weight from it, which the files do not "
                "keep; torch.nn.utils.parametrize.remove_parametrizations makes that weight a plain tensor"
            )
        if not isinstance(tensor, torch.Tensor):
            raise PaletteError(f"cannot save {name}: it is a {type(tensor).__name__}, not a tensor")
        if tensor.is_floating_point() and tensor.element_size() < 2:
            raise PaletteError(
                f"cannot save {name}: it is {tensor.dtype}, which load_palettized does not read; "
                "cast it to float16 or wider"
            )


def _require_palettes(found: bool) -> None:  # noqa: FBT001 - private, one caller's condition
    if not found:
        raise PaletteError("cannot save: no module of the model runs from a palette; palettize it first")


def _joined(module: str, leaf: str) -> str:
    return ".".join(filter(None, (module, leaf)))
