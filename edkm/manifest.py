"""The json beside the weights: which module runs from which palette, and which names share a tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edkm.errors import PaletteError

MANIFEST = "palettized.json"
WEIGHTS = "palettized.safetensors"
INDEX = "palettized.safetensors.index.json"
_FORMAT = "edkm-palettized"
_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """What a palettized directory says of itself.

    Arguments:
        palettes: shape of the dense weight, by the name of the palette.
        modules: the palette that a module runs from, by the module's name.
        aliases: the tensor in the file that a tied name of the state dict stands for.
    """

    palettes: Mapping[str, tuple[int, ...]]
    modules: Mapping[str, str]
    aliases: Mapping[str, str]

    def joined(self, other: Manifest) -> Manifest:
        """What two parts of a directory say together."""
        return Manifest(
            {**self.palettes, **other.palettes},
            {**self.modules, **other.modules},
            {**self.aliases, **other.aliases},
        )

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(self)}, indent=1)

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read and check a directory's manifest.

        Raises:
            PaletteError: it is missing, of another version, or damaged.
        """
        path = directory / MANIFEST
        found = read_object(path)
        if (found.get("format"), found.get("version")) != (_FORMAT, _VERSION):
            raise PaletteError(
                f"cannot load {path}: its format is {found.get('format')!r} {found.get('version')!r}, "
                f"this reads {_FORMAT!r} {_VERSION}"
            )
        parts = [found.get(name) for name in ("palettes", "modules", "aliases")]
        palettes, modules, aliases = (part if isinstance(part, dict) else None for part in parts)
        if palettes is None or modules is None or aliases is None:
            raise PaletteError(f"cannot load {path}: palettes, modules or aliases are missing: it was edited")
        for name, shape in palettes.items():
            if not (
                isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
            ):
                raise PaletteError(f"cannot load {path}: the shape of {name} is {shape!r}: it was edited")
        for name, palette in modules.items():
            if not isinstance(palette, str) or palette not in palettes:
                raise PaletteError(
                    f"cannot load {path}: {name} runs from {palette!r}, which is no palette of it"
                )
        for name, source in aliases.items():
            if not isinstance(source, str):
                raise PaletteError(f"cannot load {path}: {name} stands for {source!r}: it was edited")
        return cls({name: tuple(shape) for name, shape in palettes.items()}, modules, aliases)


def read_object(path: Path) -> dict[str, Any]:
    """Read a json object.

    Raises:
        PaletteError: the file is missing, cannot be read, or is not a json object.
    """
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise PaletteError(
            f"cannot load {path}: there is no such file; is this a palettized directory?"
        ) from error
    except OSError as error:
        raise PaletteError(f"cannot load {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise PaletteError(f"cannot load {path}: it is not json ({error})") from error
    if not isinstance(found, dict):
        raise PaletteError(f"cannot load {path}: it is a json {type(found).__name__}, not an object")
    return found
