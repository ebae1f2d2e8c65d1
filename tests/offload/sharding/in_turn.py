"""Several checks in one launch of ranks, whose start costs more than most checks."""

import importlib

import torch.distributed as dist

from bench.ranks import run_ranks


def run_in_turn(module: str, *cases: str, num_ranks: int, arguments: tuple[str, ...] = ()) -> None:
    """Run functions of `module` one after the other on the same ranks; what a rank raises names the one."""
    run_ranks(f"{__name__}:in_turn", module, " ".join(cases), *arguments, num_ranks=num_ranks)


def in_turn(rank: int, module: str, cases: str, *arguments: str) -> None:
    for case in cases.split():
        getattr(importlib.import_module(module), case)(rank, *arguments)
        dist.barrier()
