"""Write a palettized model: safetensors and json, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from edkm.errors import PaletteError
from edkm.manifest import INDEX, MANIFEST, WEIGHTS, Manifest
from edkm.palettized import PalettizedEmbedding, PalettizedLinear

_SHARD_BYTES = 2_000_000_000
_PARTIAL = ".partial"


def save_palettized(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write a palettized model's weights; tied ones once, nothing pickled.

    Writes `palettized.safetensors` (above 2 GB in parts, with an index) and, last, `palettized.json`. All are
    written to a folder inside of `directory` and then moved.

    Arguments:
        model: `palettize` made it.
        directory: made when missing.

    Raises:
        PaletteError: nothing of the model is on a palette, or some of it is still clustered.
        FileExistsError: the directory is not empty.
        OSError: writing failed, for instance on a full disk; nothing of it is left.
    """
    tensors, manifest = _collect(model)
    write_whole(tensors, manifest, directory=Path(directory), shard_bytes=_SHARD_BYTES)


def write_whole(
    tensors: Mapping[str, torch.Tensor], manifest: Manifest, *, directory: Path, shard_bytes: int
) -> None:
    """Write tensors and manifest to a new or empty directory, in parts of at most `shard_bytes` where one
    tensor allows.

    Raises:
        FileExistsError: the directory is not empty.
        OSError: writing failed; nothing of it is left.
    """
    is_new = not directory.exists()
    if not is_new and any(directory.iterdir()):
        raise FileExistsError(f"cannot save to {directory}: it is not empty; name a new directory")
    partial = directory / _PARTIAL
    partial.mkdir(parents=True)
    try:
        _write(tensors, directory=partial, shard_bytes=shard_bytes)
        (partial / MANIFEST).write_text(manifest.to_json())
        for path in partial.iterdir():
            path.chmod((partial / MANIFEST).stat().st_mode)  # safetensors makes files for their owner alone
        # What makes it a palettized directory comes last.
        for path in sorted(partial.iterdir(), key=lambda path: path.name == MANIFEST):
            path.replace(directory / path.name)
        partial.rmdir()
    except BaseException as error:
        # It was empty, so what is in it is ours.
        for path in [partial, *directory.glob("palettized*")]:
            _remove(path)
        if is_new:
            directory.rmdir()
        if isinstance(error, OSError | SafetensorError):
            num_bytes = sum(tensor.nbytes for tensor in tensors.values())
            raise OSError(
                f"cannot save {num_bytes} bytes to {directory}, nothing is left: {error}"
            ) from error
        raise


def _collect(model: nn.Module) -> tuple[dict[str, torch.Tensor], Manifest]:
    modules: dict[str, str] = {}
    palettes: dict[int, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PalettizedLinear | PalettizedEmbedding):
            palette = palettes.setdefault(id(module.palette), name)
            modules[name] = palette
            if palette == name:
                shapes[name] = module.palette.shape
                tensors[_joined(name, "palette.table")] = module.palette.table
                tensors[_joined(name, "palette.indices")] = module.palette.indices
    if not modules:
        raise PaletteError("cannot save: no module of the model runs from a palette; palettize it first")
    aliases = _add_dense(model, tensors, modules=modules)
    return tensors, Manifest(shapes, modules, aliases)


def _add_dense(
    model: nn.Module, tensors: dict[str, torch.Tensor], *, modules: Mapping[str, str]
) -> dict[str, str]:
    """Add what is not on a palette, each tensor once; returns the other names of those that are tied."""
    of_palettes = {_joined(name, f"palette.{part}") for name in modules for part in ("table", "indices")}
    names: dict[tuple[object, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        if name in of_palettes:
            continue
        if not isinstance(tensor, torch.Tensor) or ".parametrizations." in f".{name}":
            raise PaletteError(
                f"cannot save {name}: it is not a plain tensor; palettize clustered weights first"
            )
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else (name,)
        first = names.setdefault(key, name)
        if first == name:
            tensors[name] = tensor
        else:
            aliases[name] = first
    return aliases


def _write(tensors: Mapping[str, torch.Tensor], *, directory: Path, shard_bytes: int) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        save_file({name: _storable(tensor) for name, tensor in tensors.items()}, directory / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"palettized-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: _storable(tensor) for name, tensor in shard.items()}, directory / file)
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(content, indent=1))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _storable(tensor: torch.Tensor) -> torch.Tensor:
    # Views of one storage are refused by the format; each gets bytes of its own.
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _joined(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf
