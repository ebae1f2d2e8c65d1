"""Held bytes of fixed graphs, by tensor: what `bench/test_memory.py` compares with the checked-in baseline.

python -m bench.memory --write      # after a change that is meant to move them
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.llama import LlamaStep
from bench.reference_graph import Graph
from offload import SavedTensorStore

BASELINE = Path(__file__).parent / "baseline.json"
TOLERANCE = 0.01
"""More than this above the baseline fails."""


def _clustering(store: SavedTensorStore) -> Tensor:
    return Graph(256).step(store)


def _llama(dtype: str) -> Callable[[SavedTensorStore], Tensor]:
    return lambda store: LlamaStep(dtype).step(store)


def _masks(store: SavedTensorStore) -> Tensor:
    """Run a step with masks, one-hot rows, views and repeated rows: the cases that the codecs are for."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Embedding(64, 96), nn.Linear(96, 96), nn.ReLU(), nn.Dropout(0.5), nn.Linear(96, 96)
    )
    tokens = torch.randint(64, (16, 128))
    with store:
        hidden = layers(tokens)
        first, second, third = hidden.chunk(3, dim=-1)
        return (
            torch.where(first > 0, second, third) * nn.functional.max_pool1d(third, 4).repeat(1, 1, 4)
        ).sum()


GRAPHS: Mapping[str, Callable[[SavedTensorStore], Tensor]] = {
    "clustering": _clustering,
    "llama-float32": _llama("float32"),
    "llama-bfloat16": _llama("bfloat16"),
    "llama-autocast": _llama("autocast"),
    "masks": _masks,
}

STORES: Mapping[str, Callable[[], SavedTensorStore]] = {
    "dedupe": SavedTensorStore,
    "uniquify": lambda: SavedTensorStore(uniquify=True),
}


def held(graph: str, store: str) -> dict[str, Any]:
    """Return the bytes held at the end of forward, and those kept for each kind of tensor, largest first."""
    saved = STORES[store]()
    loss = GRAPHS[graph](saved)
    kept: dict[str, int] = {}
    for row in saved.rows():
        name = f"{row.site.rpartition(':')[0]} {row.dtype}{list(row.shape)}".replace("torch.", "")
        kept[name] = kept.get(name, 0) + row.kept_bytes
    result = {
        "held_bytes": saved.stats.held_bytes,
        "kept_bytes": dict(sorted(kept.items(), key=lambda item: -item[1])),
    }
    del loss
    return result


def grown(now: dict[str, Any], baseline: dict[str, Any]) -> str | None:
    """Say what grew if `now` holds 1 % more than `baseline`: both figures, then the tensors; else None."""
    if now["held_bytes"] <= baseline["held_bytes"] * (1 + TOLERANCE):
        return None
    lines = [f"held {now['held_bytes']} bytes, the baseline holds {baseline['held_bytes']}"]
    for name, num_bytes in now["kept_bytes"].items():
        before = baseline["kept_bytes"].get(name, 0)
        if num_bytes > before:
            lines.append(f"  {name}: {num_bytes} bytes, was {before}")
    return "\n".join(lines)


def main() -> None:
    """Print every graph's bytes as JSON, or write them as the new baseline."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.memory", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--write", action="store_true", help="write the baseline instead of printing")
    options = parser.parse_args()
    table = {f"{graph}/{store}": held(graph, store) for graph in GRAPHS for store in STORES}
    text = json.dumps(table, indent=1) + "\n"
    if not options.write:
        print(text, end="")
        return
    partial = BASELINE.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(BASELINE)


if __name__ == "__main__":
    main()
