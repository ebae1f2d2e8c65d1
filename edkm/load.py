"""Read a palettized model, one tensor at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from edkm.cluster import guard_save_pretrained
from edkm.errors import PaletteError
from edkm.manifest import INDEX, WEIGHTS, Manifest, read_object
from edkm.palette import Palette, check_parts
from edkm.palettize import put_palette

_TABLE, _INDICES = "palette.table", "palette.indices"
_FLOATS = frozenset({"F16", "BF16", "F32", "F64"})


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file, not read yet."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    def read(self, name: str) -> torch.Tensor:
        # Opened anew each time: a file that stays mapped counts a second time for all that was read from it.
        with safe_open(self.file, framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
            return tensor.clone()


def load_palettized(directory: str | os.PathLike[str], *, into: nn.Module) -> nn.Module:
    """Load what `save_palettized` wrote.

    The memory it takes peaks at the file plus one tensor, beside what `into` holds.

    Arguments:
        directory: with `palettized.json`.
        into: a model of the same shape, its parameters on the meta device or not; linears and embeddings on a
            palette are replaced, the dtypes become the file's. Buffers that a state dict leaves out are kept,
            so they must have values.

    Returns:
        The model, or what replaces it where it is itself a palettized module.

    Raises:
        PaletteError: a file is missing, truncated or edited, or the model has another shape; `into` is
            unchanged then.
    """
    folder = Path(directory)
    manifest = Manifest.read(folder)
    stored = _stored_tensors(folder)
    dense = _check(into, manifest, stored=stored)
    palettes: dict[str, Palette] = {}
    for name, source in manifest.modules.items():
        if source not in palettes:
            palettes[source] = _read_palette(source, manifest, stored=stored).to(_device(into, name))
        into = put_palette(into, name, palette=palettes[source])
    read: dict[str, torch.Tensor] = {}
    for name in dense:
        source = manifest.aliases.get(name, name)
        if source not in read:
            read[source] = _like(_tensor(into, name), stored[source].read(source))
        _put(into, name, tensor=read[source])
    guard_save_pretrained(into)
    return into


def _stored_tensors(folder: Path) -> dict[str, _Stored]:
    """Every tensor in the folder's files, by name, from the headers alone."""
    index = folder / INDEX
    if index.is_file():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) and Path(file).name == file for file in weight_map.values()
        ):
            raise PaletteError(f"cannot load {index}: its weight_map does not name files beside it")
        files = sorted(set(weight_map.values()))
    else:
        files = [WEIGHTS]
    stored: dict[str, _Stored] = {}
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no dict
                    header = opened.get_slice(name)
                    stored[name] = _Stored(folder / file, tuple(header.get_shape()), header.get_dtype())
        except (OSError, SafetensorError) as error:
            raise PaletteError(
                f"cannot load {folder / file}: {error}; the file is missing, truncated or damaged"
            ) from error
    return stored


def _check(into: nn.Module, manifest: Manifest, *, stored: Mapping[str, _Stored]) -> list[str]:
    """Check that files, manifest and model belong together; returns the model's names that stay dense."""
    modules = dict(into.named_modules(remove_duplicate=False))
    for name, palette in manifest.modules.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear | nn.Embedding):
            raise PaletteError(f"cannot load {name}: the model has no linear and no embedding of that name")
        _require_shape(name, tuple(module.weight.shape), manifest.palettes[palette])
    replaced = {_joined(name, "weight") for name in manifest.modules}
    dense = {name: tensor for name, tensor in into.state_dict().items() if name not in replaced}
    sources = {name: manifest.aliases.get(name, name) for name in dense}
    parts = {_joined(name, part) for name in manifest.palettes for part in (_TABLE, _INDICES)}
    _require_names(parts | set(sources.values()), set(stored))
    for name, shape in manifest.palettes.items():
        _check_palette(name, shape, stored=stored)
    for name, tensor in dense.items():
        _require_shape(name, tuple(tensor.shape), stored[sources[name]].shape)
        _require_dtype(name, stored[sources[name]].dtype, is_float=tensor.is_floating_point())
    _require_values(into)
    return list(dense)


def _check_palette(name: str, shape: tuple[int, ...], *, stored: Mapping[str, _Stored]) -> None:
    table, indices = (stored[_joined(name, part)] for part in (_TABLE, _INDICES))
    _require_dtype(_joined(name, _TABLE), table.dtype, is_float=True)
    _require_dtype(_joined(name, _INDICES), indices.dtype, is_float=False)
    try:
        check_parts(list(table.shape), list(indices.shape), shape=shape)
    except PaletteError as error:
        raise PaletteError(f"cannot load {name}: {error}") from error
    if num_bad := int((~table.read(_joined(name, _TABLE)).isfinite()).sum()):
        raise PaletteError(
            f"cannot load {_joined(name, _TABLE)}: {num_bad} of its {math.prod(table.shape)} values are NaN "
            "or infinite"
        )


def _require_names(expected: set[str], found: set[str]) -> None:
    missing, surplus = sorted(expected - found), sorted(found - expected)
    if missing or surplus:
        raise PaletteError(
            f"the files do not fit the model: {len(missing)} tensors are missing {missing[:3]}, "
            f"{len(surplus)} are not the model's {surplus[:3]}"
        )


def _require_dtype(name: str, dtype: str, *, is_float: bool) -> None:
    fits = dtype in _FLOATS if is_float else dtype not in _FLOATS
    if not fits or (name.endswith(_INDICES) and dtype != "U8"):
        wanted = "floating point" if is_float else "integers"
        raise PaletteError(f"cannot load {name}: it is {dtype} in the file, where {wanted} belong")


def _require_shape(name: str, expected: tuple[int, ...], found: tuple[int, ...]) -> None:
    if expected != found:
        raise PaletteError(
            f"cannot load {name}: the model has shape {list(expected)}, the file {list(found)}"
        )


def _require_values(into: nn.Module) -> None:
    saved = into.state_dict()
    for name, buffer in into.named_buffers():
        if buffer.is_meta and name not in saved:
            raise PaletteError(
                f"cannot load into the model: its buffer {name} is on the meta device and no file has it: "
                "put only the parameters on the meta device"
            )


def _read_palette(name: str, manifest: Manifest, *, stored: Mapping[str, _Stored]) -> Palette:
    table, indices = (stored[part].read(part) for part in (_joined(name, _TABLE), _joined(name, _INDICES)))
    return Palette(table, indices, shape=manifest.palettes[name])


def _device(model: nn.Module, name: str) -> torch.device:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    return torch.device("cpu") if weight.is_meta else weight.device


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    parent, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(parent), leaf)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _like(old: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor from a file as what it stands for: a parameter or a buffer, on its device."""
    tensor = tensor if old.is_meta else tensor.to(old.device)
    return nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor


def _put(model: nn.Module, name: str, *, tensor: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, tensor)


def _joined(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf
