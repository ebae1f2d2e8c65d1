"""The paper's ablation on the reference graph: bytes that each stage of the store leaves, and what it costs
in time.

    python -m bench.ablation --size 4096 --json

With --ranks N every rank holds the same weight, and a weight above 2048 x 2048 has one timed step a row: the
medians are then those of 2048 x 2048.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from bench.machine import keep, machine
from bench.ranks import run_ranks
from bench.reference_graph import Graph, asked_bytes
from bench.rounds import Inside, median_ratio, step_seconds
from offload import SavedTensorStore

_MIB = 2**20
_RANK_COPIES = 75  # a rank's peak, in copies of the bf16 weight: 2.4 GiB at 4096 x 4096
_MEDIANS_SIZE = 2048
"""A larger weight's medians are taken at this size."""

_PAPER = {
    "none": {"held_mib": 1600.0, "time_over_plain": 1.0},
    "dedupe": {"held_mib": 544.0, "time_over_plain": 1.04},
    "dedupe+shard": {"held_mib": 68.0, "time_over_plain": 1.10},
    "dedupe+uniquify": {"held_mib": 97.0, "time_over_plain": 1.84},
    "dedupe+uniquify+shard": {"held_mib": 12.3, "time_over_plain": 1.72},
}
"""Of the paper's table at 4096 x 4096, a learner's worth of 8, the weight counted; eDKM, arXiv 2309.00964."""

_WAYS: dict[str, dict[str, bool]] = {
    "none": {"dedupe": False},
    "dedupe": {},
    "dedupe+shard": {"shard": True},
    "dedupe+uniquify": {"uniquify": True},
    "dedupe+uniquify+shard": {"uniquify": True, "shard": True},
}


def measure(size: int, *, num_rounds: int) -> dict[str, Any]:
    """Return the table for a weight of `size` x `size`."""
    graph = Graph(size)
    asked, parameters = asked_bytes(graph)
    plain = [gradient.clone() for gradient in graph.gradients(nullcontext())]
    alone = {name: options for name, options in _WAYS.items() if "shard" not in options}
    rows = {name: _bytes_of(graph, plain, **options) for name, options in alone.items()}
    ways = {"plain": nullcontext} | {name: _entering(**options) for name, options in alone.items()}
    seconds = step_seconds(graph.step, ways, num_rounds=num_rounds, num_warmup=1)
    for name, row in rows.items():
        row["time_over_plain"] = round(median_ratio(seconds[name], seconds["plain"]), 3)
        row["step_seconds"] = [round(each, 3) for each in seconds[name]]
    return {
        "size": size,
        "asked_mib": asked / _MIB,
        "asked_for_parameters_mib": parameters / _MIB,
        "plain_step_seconds": [round(each, 3) for each in seconds["plain"]],
        "rows": rows,
        "paper": {name: _PAPER[name] for name in rows},
        "machine": machine(),
    }


def measure_rank(rank: int, size: str, medians_size: str, num_rounds: str, folder: str) -> None:
    """Write this rank's table, of all rows, to `folder`; every rank runs each row's step at the same time."""
    torch.set_num_threads(1)
    graph = Graph(int(size))
    plain = [gradient.clone() for gradient in graph.gradients(nullcontext())]
    rows = {name: _bytes_of(graph, plain, **options) for name, options in _WAYS.items()}
    if int(size) != int(medians_size):
        for name, each in _rank_seconds(graph, num_rounds=1).items():
            rows[name]["one_step_over_plain"] = each["time_over_plain"]
        graph = Graph(int(medians_size))
    for name, each in _rank_seconds(graph, num_rounds=int(num_rounds)).items():
        rows[name] |= each
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    Path(folder, f"{rank}.json").write_text(json.dumps({"rows": rows, "peak_bytes": peak_bytes}))


def _rank_seconds(graph: Graph, *, num_rounds: int) -> dict[str, dict[str, float]]:
    ways: dict[str, Inside] = {"plain": nullcontext}
    ways |= {name: _entering(**options) for name, options in _WAYS.items()}

    def step(inside: AbstractContextManager[Any]) -> Tensor:
        dist.barrier()
        return graph.step(inside)

    seconds = step_seconds(step, ways, num_rounds=num_rounds, num_warmup=0)
    return {
        name: {
            f"time_over_{base}": round(median_ratio(seconds[name], seconds[base]), 3)
            for base in ("plain", "none")
        }
        for name in _WAYS
    }


def measure_ranks(
    size: int, *, num_ranks: int, num_rounds: int, medians_size: int = _MEDIANS_SIZE
) -> dict[str, Any]:
    """Return the table of a job of `num_ranks` ranks on this machine that all hold the same weight: of each
    row the most that a rank held, what all of them held, and the median rank's time, over `num_rounds` steps
    of a weight that has at most `medians_size` rows. Of a larger one a single step is timed.

    Raises:
        SystemExit: all ranks together need more memory than there is.
    """
    needed, room = num_ranks * _RANK_COPIES * 2 * size * size, psutil.virtual_memory().available
    if needed > room:
        raise SystemExit(
            f"{num_ranks} ranks at {size} x {size} need about {needed / 2**30:.1f} GiB, and "
            f"{room / 2**30:.1f} GiB are free; give a smaller --size or fewer --ranks"
        )
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(
            "bench.ablation:measure_rank",
            str(size),
            str(min(size, medians_size)),
            str(num_rounds),
            folder,
            num_ranks=num_ranks,
            timeout_seconds=3000,
        )
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(num_ranks)]
    rows = {name: _over_ranks([rank["rows"][name] for rank in ranks]) for name in _WAYS}
    return {
        "size": size,
        "num_ranks": num_ranks,
        "medians_of_rounds": num_rounds,
        "medians_size": min(size, medians_size),
        "seconds": round(time.monotonic() - began, 1),
        # Each rank's own most, whenever that was; what ranks map together counts for each of them.
        "peak_memory_gib": round(sum(rank["peak_bytes"] for rank in ranks) / 2**30, 2),
        "rows": rows,
        "paper": _PAPER,
        "machine": machine(),
    }


def _over_ranks(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "held_mib": max(row["held_mib"] for row in rows),
        "held_at_exit_mib": max(row["held_at_exit_mib"] for row in rows),
        "peak_held_mib": max(row["peak_held_mib"] for row in rows),
        "group_held_mib": round(sum(row["held_mib"] for row in rows), 4),
        "num_by_stage": rows[0]["num_by_stage"],
        "bit_identical": all(row["bit_identical"] for row in rows),
        "held_after_backward_bytes": max(row["held_after_backward_bytes"] for row in rows),
    } | {
        name: statistics.median(row[name] for row in rows)
        for name in ("one_step_over_plain", "time_over_plain", "time_over_none")
        if name in rows[0]
    }


def _entering(**options: bool) -> Any:
    return lambda: SavedTensorStore(**options)


def _bytes_of(graph: Graph, plain: list[Tensor], **options: bool) -> dict[str, Any]:
    store = SavedTensorStore(**options)
    loss = graph.step(store)
    at_exit = store.stats
    _meet(store)
    held = store.stats
    loss.backward()
    gradients = [graph.weight.grad, graph.centroids.grad]
    identical = all(
        mine is not None and torch.equal(mine.view(torch.int16), theirs.view(torch.int16))
        for mine, theirs in zip(gradients, plain, strict=True)
    )
    return {
        "saved_mib": held.saved_bytes / _MIB,
        "storage_mib": held.storage_bytes / _MIB,
        "held_mib": round(held.held_bytes / _MIB, 4),
        "held_at_exit_mib": round(at_exit.held_bytes / _MIB, 4),
        "peak_held_mib": round(held.peak_held_bytes / _MIB, 4),
        "held_after_backward_bytes": store.stats.held_bytes,
        "num_by_stage": dict(held.num_by_stage),
        "bit_identical": identical,
    }


def _meet(store: SavedTensorStore) -> None:
    """Let every rank reach the end of forward, and look at what the others announced by then."""
    if dist.is_initialized():
        for _ in range(2):
            dist.barrier()
            store.report()
        dist.barrier()


def main() -> None:
    """Measure, print, and keep the result when asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.ablation", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--size", type=int, default=1024, help="rows and columns of the weight (default 1024)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="timed steps of each row; the median is told (default 3)"
    )
    parser.add_argument("--ranks", type=int, default=1, help="ranks that hold the same weight (default 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--keep", action="store_true", help="also write it to bench/results/")
    options = parser.parse_args()
    if options.ranks > 1:
        result = measure_ranks(options.size, num_ranks=options.ranks, num_rounds=options.rounds)
    else:
        result = measure(options.size, num_rounds=options.rounds)
    if options.keep:
        keep("ablation" if options.ranks == 1 else f"ablation-{options.size}-ranks{options.ranks}", result)
    print(json.dumps(result, indent=1) if options.json else table(result))


def table(result: dict[str, Any]) -> str:
    """Return the result as lines for people, the paper's bytes and times beside ours."""
    lines = [
        _of_ranks(result) if "medians_size" in result else _of_one(result),
        f"{'':22} {'held MiB':>10} {'paper':>7} {'peak MiB':>10} {'time':>6} {'paper':>6}  gradients",
    ]
    for name, row in result["rows"].items():
        same, paper = "equal" if row["bit_identical"] else "DIFFER", result["paper"][name]
        sizes = f"{row['held_mib']:>10.2f} {paper['held_mib']:>7.1f} {row['peak_held_mib']:>10.2f}"
        times = f"{row['time_over_plain']:>5.2f}x {paper['time_over_plain']:>5.2f}x"
        lines.append(f"{name:22} {sizes} {times}  {same}")
    return "\n".join(lines)


def _of_one(result: dict[str, Any]) -> str:
    return f"asked {result['asked_mib']:.1f} MiB, {result['asked_for_parameters_mib']:.1f} of them parameters"


def _of_ranks(result: dict[str, Any]) -> str:
    size, medians_size = result["size"], result["medians_size"]
    return (
        f"{result['num_ranks']} ranks at {size} x {size} in {result['peak_memory_gib']:.1f} GiB and "
        f"{result['seconds']:.0f} s; held and peak of the rank that held most, times at "
        f"{medians_size} x {medians_size}"
    )


if __name__ == "__main__":
    main()
