"""What sharing costs: forward and backward of a replicated step whose ranks share each activation, through
memory, by all-gather one ahead and by all-gather on demand, over the same step without a store.

python -m bench.shard --json
"""

import argparse
import json
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from bench.machine import keep, machine
from bench.ranks import run_ranks
from bench.rounds import median_ratio
from offload import SavedTensorStore
from offload.sharding.gathers import Gathers

_ON_DEMAND = "on demand"
_WIDTH = 1024
_NUM_LAYERS = 4
_MIB = 2**20
_SIZES_MIB = (4, 32)
_RANKS = (2, 4, 8)
_TIMED_MIB = 320
"""Rounds of all ranks that together save so much of each activation: short steps need more of them."""
_LEAST_ROUNDS, _LEAST_RANK_ROUNDS = 20, 4
"""Of all ranks together, and of each."""


def measure_rank(rank: int, size_mib: str, num_rounds: str, folder: str) -> None:
    """Write this rank's seconds, a figure a round, and bytes of each way to `folder`."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    weights = [
        (torch.randn(_WIDTH, _WIDTH, generator=generator) * _WIDTH**-0.5).requires_grad_()
        for _ in range(_NUM_LAYERS)
    ]
    rows = int(size_mib) * _MIB // (4 * _WIDTH)
    ways: dict[str, SavedTensorStore | None] = {
        "no store": None,
        "store": SavedTensorStore(),
        "shared memory": SavedTensorStore(shard="shared-memory"),
        "all-gather": SavedTensorStore(shard="all-gather"),
        _ON_DEMAND: SavedTensorStore(shard="all-gather"),
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {"forward": [], "backward": []} for name in ways}
    held = dict.fromkeys(ways, 0.0)
    for number in range(int(num_rounds) + 1):
        # Each way takes its turn behind each other: what a step leaves in caches and heap is the next one's.
        turn = number % len(ways)
        for name in [*ways][turn:] + [*ways][:turn]:
            store = ways[name]
            # Fresh bytes in every step, the same on each rank: what a tensor-parallel batch is.
            batch = torch.randn(rows, _WIDTH, generator=torch.Generator().manual_seed(number))
            dist.barrier()
            forward_seconds, loss = _timed_forward(weights, batch, inside=store or nullcontext())
            dist.barrier()
            held[name] = store.stats.held_bytes / _MIB if store is not None else 0.0
            dist.barrier()
            start = time.perf_counter()
            with _without_prefetch() if name == _ON_DEMAND else nullcontext():
                loss.backward()
            if number:
                seconds[name]["forward"].append(forward_seconds)
                seconds[name]["backward"].append(time.perf_counter() - start)
    rows = {name: times | {"held_mib": held[name]} for name, times in seconds.items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(rows))


def _without_prefetch() -> AbstractContextManager[Any]:
    return patch.object(Gathers, "_begin_one_ahead", lambda *_: None)


def _timed_forward(
    weights: list[Tensor], batch: Tensor, *, inside: AbstractContextManager[Any]
) -> tuple[float, Tensor]:
    start = time.perf_counter()
    with inside:
        for weight in weights:
            batch = torch.tanh(batch @ weight)
        loss = batch.square().mean()
    return time.perf_counter() - start, loss


def measure(size_mib: int, *, num_ranks: int, num_rounds: int | None = None) -> dict[str, Any]:
    """Return a row for each way: of the rank that fares worst, the median over rounds of its time over that
    without a store in the same round.
    """
    all_rounds = max(_LEAST_ROUNDS, _TIMED_MIB // size_mib)
    num_rounds = num_rounds or max(_LEAST_RANK_ROUNDS, all_rounds // num_ranks)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (str(size_mib), str(num_rounds), folder)
        run_ranks("bench.shard:measure_rank", *arguments, num_ranks=num_ranks, timeout_seconds=900)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(num_ranks)]
    return {
        name: {
            "forward_over_no_store": _worst(ranks, name, when="forward"),
            "backward_over_no_store": _worst(ranks, name, when="backward"),
            "backward_over_store": _worst(ranks, name, when="backward", base="store"),
            "held_mib": round(max(rank[name]["held_mib"] for rank in ranks), 2),
        }
        for name in ranks[0]
    }


def _worst(ranks: list[dict[str, Any]], name: str, *, when: str, base: str = "no store") -> float:
    return round(max(median_ratio(rank[name][when], rank[base][when]) for rank in ranks), 3)


def main() -> None:
    """Measure, print, and keep the result when asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.shard", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--size", type=int, action="append", help="MiB of an activation (default 4 and 32)")
    parser.add_argument("--ranks", type=int, action="append", help="ranks of the job (default 2, 4 and 8)")
    parser.add_argument(
        "--rounds",
        type=int,
        help="timed steps of each way (default at 2 ranks 40 at 4 MiB, 10 at 32; fewer at more)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--keep", action="store_true", help="also write it to bench/results/")
    options = parser.parse_args()
    result: dict[str, Any] = {
        f"{size} MiB, {ranks} ranks": measure(size, num_ranks=ranks, num_rounds=options.rounds)
        for size in options.size or _SIZES_MIB
        for ranks in options.ranks or _RANKS
    }
    if options.keep:
        keep("shard", result | {"machine": machine()})
    print(json.dumps(result | {"machine": machine()}, indent=1) if options.json else _table(result))


def _table(result: dict[str, Any]) -> str:
    lines = [f"{'':32} {'held MiB':>9} {'forward':>8} {'backward':>9}"]
    for what, rows in result.items():
        for name, row in rows.items():
            times = f"{row['forward_over_no_store']:>7.2f}x {row['backward_over_no_store']:>8.2f}x"
            lines.append(f"{what:18} {name:13} {row['held_mib']:>9.1f} {times}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
