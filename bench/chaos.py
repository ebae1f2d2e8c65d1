"""Random faults while ranks share: each rank ends with the right gradients or with the error for the fault.

python -m bench.chaos --runs 200

A run is 2 or 3 ranks, a policy and a few steps. In each, ranks save tensors of which some are equal, in
orders of their own, some of them more than others; then one of the faults: nothing, a rank killed in forward,
while it publishes or gathers, or in backward, shared bytes overwritten, a rank that raises in forward, never
enters, never runs backward or runs it twice, or collectives in the backward of ranks that save each in an
order of its own. Every gradient is compared with what it must be.
"""

import argparse
import json
import os
import random
import signal
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from bench.machine import keep, machine
from bench.ranks import run_ranks
from offload import RankMismatchError, SavedTensorStore
from offload.sharding import arena, shared_memory
from offload.sharding.all_gather import AllGather
from offload.sharding.base import Sharding
from offload.sharding.channel import Channel
from offload.sharding.shared_memory import SharedMemory

FAULTS = (
    "none",
    "killed in forward",
    "killed sharing",
    "killed in backward",
    "overwritten",
    "raises in forward",
    "never enters",
    "no backward",
    "two backwards",
    "collectives",
)
POLICIES = ("shared-memory", "all-gather")
# Who depends on others to read is told when they do not come; who shares memory goes on.
MAY_REFUSE = {
    "shared-memory": frozenset({"overwritten"}),
    "all-gather": frozenset(FAULTS) - {"none", "never enters", "collectives"},
}
_MEMORY = "/dev/shm"
_TIMEOUT_SECONDS = 4.0
_SHAPES = ((64, 64), (512, 128), (1000, 3), (7,), (256, 1024))
_NUM_STEPS = 3


def run(seed: int, *, policy: str, num_ranks: int | None = None) -> tuple[str, list[str]]:
    """Run one random job and return its fault and how each rank ended: "right", "refused" or "killed".

    Arguments:
        seed: of the job; it chooses the fault.
        policy: one of `POLICIES`.
        num_ranks: 2 or 3 by chance where None.

    Raises:
        AssertionError: a rank ended wrong, or did not end, or something was left behind.
    """
    chance = random.Random(seed)
    fault = FAULTS[seed % len(FAULTS)]
    num_ranks = num_ranks or chance.choice((2, 3))
    struck = chance.randrange(num_ranks)
    killed = frozenset({struck} if fault.startswith("killed") else ())
    with tempfile.TemporaryDirectory(dir=_MEMORY) as folder:
        arguments = (str(seed), policy, fault, str(struck), folder)
        outputs = run_ranks("bench.chaos:rank_of_run", *arguments, num_ranks=num_ranks, killed=killed)
        shared_memory.remove_abandoned(Path(folder))
        left = list(Path(folder).iterdir())
        assert not left, f"seed {seed}, {fault}: {left} is left"
    return fault, ["killed" if rank in killed else outputs[rank].split()[-1] for rank in range(num_ranks)]


def rank_of_run(rank: int, seed: str, policy: str, fault: str, struck: str, folder: str) -> None:
    """Run this rank's steps and print how they ended."""
    mine = fault if rank == int(struck) or fault == "collectives" else "none"
    sharding: Sharding = SharedMemory(directory=folder)
    if policy == "all-gather":
        sharding = AllGather(timeout_seconds=_TIMEOUT_SECONDS)
    store = SavedTensorStore(shard=sharding, uniquify=int(seed) % 2 == 1)
    ended = "right"
    for step in range(_NUM_STEPS):
        chance = random.Random(f"{seed} {step} {rank}")
        now = mine if step == int(seed) % _NUM_STEPS else "none"
        try:
            _step(
                store,
                _values(int(seed) + step, chance, are_as_many=now == "collectives"),
                fault=now,
                overwrite=partial(_overwrite, sharding, folder),
            )
        except RankMismatchError:
            assert fault in MAY_REFUSE[policy], f"refused although {fault}"
            ended = "refused"
        if mine == "killed sharing":
            # From here on: its death comes when it finds something to publish, or at the end.
            arena._write_all = _die
            Channel.wait = _die  # type: ignore[method-assign]
    if mine == "killed sharing":
        _die()
    print(ended, flush=True)
    os._exit(0)  # a group whose rank died would wait for it


def _die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


class Meeting(torch.autograd.Function):
    """The identity; its backward is a collective, as those of tensor parallelism are."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        """Return `x`."""
        return x.view_as(x)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        """Meet all ranks, and return `gradient`."""
        dist.all_reduce(torch.ones(1))
        return gradient


def _values(seed: int, chance: random.Random, *, are_as_many: bool) -> list[Tensor]:
    """Return a step's tensors: the job's, in this rank's order, and, unless ranks save as many, some left out
    and some of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    common = [torch.randn(shape, generator=generator) for shape in _SHAPES]
    common += [(value > 0).float() for value in common]
    chance.shuffle(common)
    if are_as_many:
        return common
    generator.manual_seed(chance.getrandbits(32))
    own = [torch.randn(chance.choice(_SHAPES), generator=generator) for _ in range(chance.randrange(3))]
    return common[: chance.randrange(4, len(common) + 1)] + own


def _step(
    store: SavedTensorStore, values: list[Tensor], *, fault: str, overwrite: Callable[[], None]
) -> None:
    weights = [torch.ones_like(value, requires_grad=True) for value in values]
    if fault == "never enters":
        return
    try:
        with store:
            loss = torch.zeros(())
            for weight, value in zip(weights, values, strict=True):
                loss = loss + (weight * value.clone()).sum()
                loss = Meeting.apply(loss) if fault == "collectives" else loss
            if fault == "killed in forward":
                _die()
            if fault == "raises in forward":
                raise ZeroDivisionError
    except ZeroDivisionError:
        return
    for _ in range(20):
        store.report()  # looks at what the others announced meanwhile
    if fault == "overwritten":
        overwrite()
    if fault == "no backward":
        return
    loss.backward(retain_graph=fault == "two backwards")
    if fault == "killed in backward":
        _die()
    times = 1
    if fault == "two backwards":
        loss.backward()
        times = 2
    for weight, value in zip(weights, values, strict=True):
        assert weight.grad is not None
        assert torch.equal(weight.grad, value * times), "a gradient is wrong"
    del loss
    assert store.stats.held_bytes == 0


def _overwrite(sharding: Sharding, folder: str) -> None:
    """Change what this rank shares: its ranges, or all files."""
    if isinstance(sharding, AllGather) and sharding._stretch is not None:
        for lease in sharding._stretch._leases.values():
            lease._shard[:1] += 1
    for path in [path for job in Path(folder).iterdir() for path in job.iterdir()]:
        if len(path.name) == 32:
            try:
                with path.open("r+b") as file:
                    file.write(b"overwritten")
            except FileNotFoundError:
                continue


def main() -> None:
    """Run, print how runs ended, and keep the result when asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.chaos", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--runs", type=int, default=20, help="random jobs (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the first run (default 0)")
    parser.add_argument("--keep", action="store_true", help="also write the result to bench/results/")
    options = parser.parse_args()
    ends: dict[str, Counter[str]] = {
        f"{policy}, {fault}": Counter() for policy in POLICIES for fault in FAULTS
    }
    for seed in tqdm(range(options.seed, options.seed + options.runs), unit="run"):
        policy = POLICIES[seed // len(FAULTS) % len(POLICIES)]
        fault, ranks = run(seed, policy=policy)
        ends[f"{policy}, {fault}"].update(ranks)
    result = {"num_runs": options.runs, "first_seed": options.seed, "ranks_ended": ends, "machine": machine()}
    if options.keep:
        keep("chaos", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
