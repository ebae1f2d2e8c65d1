"""LLaMA-7B packed to 3 bits, 8 for embedding and head, layer by layer, and loaded to palettized modules."""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from bench.scale.child import run_child
from bench.scale.room import require_disk, require_memory
from bench.scale.shape import LLAMA_7B, Shape
from edkm import DKMConfig, Palette, palettize, save_palettized
from integrations.palettized import load_model

PACK_PEAK_LIMIT_BYTES = 4 << 30
LOAD_PEAK_LIMIT_BYTES = 3.1 * 2**30
"""Of the processes that pack and load."""

_BITS, _EMBEDDING_BITS = 3, 8
_TOLERANCE = 0.01


def measure(shape: Shape = LLAMA_7B) -> dict[str, Any]:
    """Return the directory's bytes, and peaks and seconds of a process that packs and one that loads.

    Raises:
        SystemExit: it would not fit.
    """
    expected = _expected_bytes(shape)
    require_memory(expected, what="pack7b")
    folder = Path(tempfile.gettempdir())
    require_disk(expected + expected // 20, folder=folder, what="pack7b")
    result: dict[str, Any] = {"shape": asdict(shape), "num_weights": shape.num_weights}
    with tempfile.TemporaryDirectory(dir=folder) as name:
        directory = Path(name) / "palettized"
        named = {"shape": asdict(shape), "directory": str(directory)}
        result["pack"] = run_child("bench.scale.pack7b:pack", **named)
        result["directory_bytes"] = sum(path.stat().st_size for path in directory.iterdir())
        result["load"] = run_child("bench.scale.pack7b:load", directory=str(directory))
    result["expected_bytes"] = expected
    return result | {
        "within_limits": abs(result["directory_bytes"] / expected - 1) <= _TOLERANCE
        and result["pack"]["peak_bytes"] <= PACK_PEAK_LIMIT_BYTES
        and result["load"]["peak_bytes"] <= LOAD_PEAK_LIMIT_BYTES
    }


def table(result: dict[str, Any]) -> str:
    """Return the result for reading."""
    lines = [f"{'':6} {'peak GiB':>9} {'limit':>6} {'s':>8}"]
    for what, limit in (("pack", PACK_PEAK_LIMIT_BYTES), ("load", LOAD_PEAK_LIMIT_BYTES)):
        row = result[what]
        figures = row["peak_bytes"] / 2**30, limit / 2**30
        lines.append(f"{what:6} {figures[0]:>9.2f} {figures[1]:>6.1f} {row['seconds']:>8.1f}")
    found, expected = (result[key] / 2**30 for key in ("directory_bytes", "expected_bytes"))
    dense = 2 * result["num_weights"] / 2**30
    lines.append(f"directory {found:.3f} GiB, by the bits {expected:.3f}, in bfloat16 {dense:.3f}")
    return "\n".join(lines)


def pack(shape: dict[str, int], directory: str) -> dict[str, Any]:
    """Make and pack a model part by part, in a child."""
    torch.manual_seed(0)
    start = time.perf_counter()
    save_palettized(_parts(Shape(**shape)), directory)
    Shape(**shape).config().save_pretrained(directory)
    return {"seconds": round(time.perf_counter() - start, 1)}


def load(directory: str) -> dict[str, Any]:
    """Load a model to palettized modules, in a child."""
    start = time.perf_counter()
    model = load_model(directory)
    palettes = [module for module in model.modules() if isinstance(module, Palette)]
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "packed_bytes": sum(each.num_bytes for each in palettes),
    }


def _parts(shape: Shape) -> Iterator[tuple[str, nn.Module]]:
    """Each part of the model, palettized, under its name."""
    config = DKMConfig(bits=_BITS, embedding_bits=_EMBEDDING_BITS)
    yield "model.embed_tokens", palettize(shape.embedding(), config)
    for number in tqdm(range(shape.num_layers), unit="layer", desc="pack", leave=False):
        yield f"model.layers.{number}", palettize(shape.layer(), config)
    yield "model.norm", shape.norm()
    # Alone, it is a linear like any other.
    yield "lm_head", palettize(shape.head(), DKMConfig(bits=_EMBEDDING_BITS))


def _expected_bytes(shape: Shape) -> int:
    decoder = shape.num_layers * shape.num_clustered * _BITS // 8
    ends = 2 * shape.vocabulary * shape.width * _EMBEDDING_BITS // 8
    return decoder + ends + 2 * shape.num_norms
