"""What the store costs and saves on a plain LLaMA training step, beside no store and beside `save_on_cpu`.

python -m bench.step --json

With --ranks N it is a distributed step: what the group holds under DDP, FSDP2 and tensor parallel, and which
tensors are shared. No times then.
"""

import argparse
import json
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu

from bench.llama import DTYPES, LlamaStep, plain_bytes
from bench.machine import keep, machine
from bench.rounds import median_ratio, step_seconds
from bench.step_ranks import measure_parallel
from bench.step_ranks import table as parallel_table
from offload import SavedTensorStore


def measure(dtype: str, *, num_rounds: int) -> dict[str, Any]:
    """Return bytes and times of one step in `dtype`, a row for each way."""
    llama = LlamaStep(dtype)
    llama.step(nullcontext()).backward()
    plain = llama.gradients()
    rows: dict[str, Any] = {
        "no store": {"held_bytes": plain_bytes(llama)["storage"]},
        "save_on_cpu": {"held_bytes": plain_bytes(llama)["saved"]},
        "dedupe": _store_row(llama, plain, uniquify=False),
        "dedupe+uniquify": _store_row(llama, plain, uniquify=True),
    }
    stores = {"dedupe": SavedTensorStore(), "dedupe+uniquify": SavedTensorStore(uniquify=True)}
    ways = {"no store": nullcontext, "save_on_cpu": save_on_cpu} | {
        name: partial(_entering, store) for name, store in stores.items()
    }
    seconds = step_seconds(llama.step, ways, num_rounds=num_rounds, num_warmup=10)
    for name, store in stores.items():
        rows[name]["steady_peak_held_bytes"] = store.stats.peak_held_bytes
    for name, row in rows.items():
        row["time_over_no_store"] = round(median_ratio(seconds[name], seconds["no store"]), 4)
        row["median_seconds"] = round(sorted(seconds[name])[num_rounds // 2], 4)
    return rows


def _entering(store: SavedTensorStore) -> SavedTensorStore:
    return store  # one store for the whole of training, as a user has


def _store_row(llama: LlamaStep, plain: list[Tensor], *, uniquify: bool) -> dict[str, Any]:
    store = SavedTensorStore(uniquify=uniquify)
    loss = llama.step(store)
    held = store.stats
    loss.backward()
    return {
        "held_bytes": held.held_bytes,
        "peak_held_bytes": held.peak_held_bytes,
        "num_by_stage": dict(held.num_by_stage),
        "bit_identical": all(map(torch.equal, llama.gradients(), plain)),
    }


def main() -> None:
    """Measure, print, and keep the result when asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.step", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="only these (default: all three)")
    parser.add_argument(
        "--rounds", type=int, default=60, help="timed steps of each way; the median is told (default 60)"
    )
    parser.add_argument("--ranks", type=int, default=1, help="ranks of the job (default 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--keep", action="store_true", help="also write it to bench/results/")
    options = parser.parse_args()
    dtypes = options.dtype or DTYPES
    if options.ranks > 1:
        result = {dtype: measure_parallel(dtype, num_ranks=options.ranks) for dtype in dtypes}
        text = "\n".join(f"{each}\n{parallel_table(result[each])}" for each in dtypes)
    else:
        result = {dtype: measure(dtype, num_rounds=options.rounds) for dtype in dtypes}
        text = "\n".join(_table(each, result[each]) for each in dtypes)
    result |= {"machine": machine()}
    if options.keep:
        keep(f"step-ranks{options.ranks}" if options.ranks > 1 else "step", result)
    print(json.dumps(result, indent=1) if options.json else text)


def _table(dtype: str, rows: dict[str, Any]) -> str:
    lines = [f"{dtype:16} {'held MiB':>10} {'time':>7}"]
    for name, row in rows.items():
        lines.append(f"{name:16} {row['held_bytes'] / 2**20:>10.2f} {row['time_over_no_store']:>6.3f}x")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
