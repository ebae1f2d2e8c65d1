"""Sharing through memory: right whatever the other ranks do, and nothing left behind."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bench.ranks import run_ranks
from offload import RankMismatchError, SavedTensorStore
from offload.sharding import arena, shared_memory
from offload.sharding.shared_memory import SharedMemory
from tests.offload.sharding.in_turn import run_in_turn

MIB = 1 << 20

pytestmark = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system in memory at /dev/shm")


@pytest.fixture
def memory() -> Iterator[str]:
    """Yield a folder of the test's own in memory, in which nothing may be left."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield folder
        shared_memory.remove_abandoned(Path(folder))
        assert list(Path(folder).iterdir()) == []


def files(memory: str) -> list[Path]:
    """Return what is published."""
    return [path for job in Path(memory).iterdir() for path in job.iterdir() if len(path.name) == 32]


def sharing(memory: str, *, uniquify: bool = False) -> SavedTensorStore:
    return SavedTensorStore(shard=SharedMemory(directory=memory), uniquify=uniquify)


def saving(values: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return weights and a loss whose graph saves each of `values`, 1 MiB each."""
    weights = [torch.ones_like(value, requires_grad=True) for value in values]
    loss = torch.stack([(weight * value).sum() for weight, value in zip(weights, values, strict=True)]).sum()
    return weights, loss


def equal_values(num: int, *, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(512, 512, generator=generator) for _ in range(num)]


def check(weights: list[Tensor], values: list[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        assert weight.grad is not None
        assert torch.equal(weight.grad, value)


def step(store: SavedTensorStore, values: list[Tensor]) -> None:
    """Run a step and compare each gradient with the tensor that it is."""
    with store:
        weights, loss = saving([value.clone() for value in values])
    dist.barrier()
    store.report()
    dist.barrier()
    loss.backward()
    check(weights, values)


# What the ranks run. Each prints nothing where all is right.


def replicated(rank: int, memory: str) -> None:
    for uniquify in (False, True):
        store = sharing(memory, uniquify=uniquify)
        for number in range(3):
            values = [
                *equal_values(3, seed=number),
                torch.full((512, 512), 3.0),
                (equal_values(1, seed=7)[0] > 0) * 1.0,
            ]
            with store:
                weights, loss = saving([value.clone() for value in values])
            dist.barrier()
            stats = store.stats
            dist.barrier()
            stats = store.stats
            # Three tensors of 1 MiB that no codec wins on, one of one value, one mask: halved over two ranks.
            others = 2 * MIB if not uniquify else 64 << 10
            assert stats.held_bytes <= 3 * MIB // 2 + others // 2, (number, stats)
            assert stats.num_by_stage["shared"] >= 3
            assert files(memory)
            loss.backward(retain_graph=True)
            check(weights, values)
            loss.backward()
            del loss
            assert store.stats.held_bytes == 0
            dist.barrier()
        del store
        dist.barrier()
        assert files(memory) == []


def differing(rank: int, memory: str) -> None:
    store = sharing(memory)
    for number in range(3):
        step(store, equal_values(4, seed=100 * rank + number))
        assert "shared" not in store.stats.num_by_stage
    assert files(memory) == []


def disordered(rank: int, memory: str) -> None:
    store = sharing(memory)
    for number in range(3):
        values = equal_values(6, seed=number)
        order = torch.randperm(6, generator=torch.Generator().manual_seed(rank + 10 * number))
        mine = [values[place] for place in order[: 6 - rank].tolist()] + equal_values(2, seed=1000 + rank)
        step(store, mine)
        assert store.stats.num_by_stage["shared"] >= 5 - 2 * rank


def failing_forward(store: SavedTensorStore) -> None:
    with store:
        _ = saving([value.clone() for value in equal_values(3, seed=2)])
        raise ZeroDivisionError


def alone(rank: int, memory: str) -> None:
    """Only rank 0 enters; then all enter and only rank 0 runs backward; then forward raises."""
    if rank == 0:
        store = sharing(memory)
        with store:
            weights, loss = saving([value.clone() for value in equal_values(3, seed=0)])
        loss.backward()
        check(weights, equal_values(3, seed=0))
    dist.barrier()
    store = sharing(memory)
    with store:
        weights, loss = saving([value.clone() for value in equal_values(3, seed=1)])
    dist.barrier()
    store.report()
    dist.barrier()
    if rank == 0:
        loss.backward()
        check(weights, equal_values(3, seed=1))
    dist.barrier()
    del loss
    assert store.stats.held_bytes == 0
    with pytest.raises(ZeroDivisionError):
        failing_forward(store)
    assert store.stats.held_bytes == 0


def publish_second(mine: arena.Arena, digest: bytes, flat: Tensor) -> Any:
    """Publish nothing before another rank is at it, so that it does not find all of its bytes published."""
    return PUBLISH(mine, digest, flat) if any(mine._folder.glob("*.part")) else None


PUBLISH = arena.Arena.publish


def killed(rank: int, memory: str, moment: str) -> None:
    store = sharing(memory)
    step(store, equal_values(4, seed=33))
    values = equal_values(4, seed=3)
    if rank == 1 and moment == "publish":
        arena._write_all = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    elif moment == "publish":
        arena.Arena.publish = publish_second  # type: ignore[method-assign]
    with store:
        weights, loss = saving([value.clone() for value in values])
        if rank == 1 and moment == "forward":
            os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1:
        store.report()
        while moment == "publish":
            store.report()  # until the other's announcement is seen
        loss.backward() if moment != "backward" else os.kill(os.getpid(), signal.SIGKILL)
    store.report()
    loss.backward()
    check(weights, values)
    os._exit(0)  # the group is broken: its end would wait for the dead


def corrupted(rank: int, memory: str) -> None:
    store = sharing(memory)
    with store:
        _, loss = saving([value.clone() for value in equal_values(1, seed=4)])
    dist.barrier()
    store.report()
    dist.barrier()
    store.report()
    if rank == 0:
        (path,) = files(memory)
        with path.open("r+b") as file:
            file.seek(1000)
            file.write(b"x")
    dist.barrier()
    with pytest.raises(RankMismatchError, match=f"its {MIB} bytes in shared memory"):
        loss.backward()
    dist.barrier()


def full(rank: int, directory: str) -> None:
    store = SavedTensorStore(shard=SharedMemory(directory=directory))
    step(store, equal_values(3, seed=5))
    step(store, [torch.randn(128, 128, generator=torch.Generator().manual_seed(6))])
    assert store.stats.num_by_stage.get("shared", 0) == 1


def grouped(rank: int, memory: str) -> None:
    """Ranks 0 and 1 hold one value, rank 2 another; a group of one shares nothing."""
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    store = SavedTensorStore(shard=SharedMemory(group=groups[rank // 2], directory=memory))
    step(store, equal_values(2, seed=rank // 2))
    assert store.stats.num_by_stage.get("shared", 0) == (2 if rank < 2 else 0)


def test_two_ranks(memory: str) -> None:
    cases = ("differing", "alone", "replicated", "disordered", "corrupted")
    run_in_turn(__name__, *cases, num_ranks=2, arguments=(memory,))


def test_three_ranks(memory: str) -> None:
    run_in_turn(__name__, "differing", "alone", "grouped", num_ranks=3, arguments=(memory,))


@pytest.mark.parametrize("moment", ["forward", "publish", "backward"])
def test_the_rank_that_lives_ends_right(moment: str, memory: str) -> None:
    run_ranks(f"{__name__}:killed", memory, moment, num_ranks=2, killed=frozenset({1}))


def test_a_full_file_system_leaves_bytes_with_their_rank(tmp_path: Path) -> None:
    if os.system(f"mount -t tmpfs -o size=1m tmpfs {tmp_path} 2>/dev/null") != 0:
        pytest.skip("mounting a tmpfs of 1 MiB is not allowed here")
    try:
        run_ranks(f"{__name__}:full", str(tmp_path), num_ranks=2)
        assert not list(tmp_path.iterdir())
    finally:
        os.system(f"umount {tmp_path}")


def test_without_a_process_group_it_does_nothing() -> None:
    store = SavedTensorStore(shard=True)
    with store:
        weights, loss = saving(equal_values(2, seed=0))
    assert store.stats.num_by_stage == {"reference": 2}
    loss.backward()
    check(weights, equal_values(2, seed=0))


@pytest.mark.parametrize("shard", ["all", "ring"])
def test_an_unknown_policy_is_named(shard: str) -> None:
    with pytest.raises(
        ValueError, match=f"shard is '{shard}'; give True, False, 'auto', 'all-gather', 'shared-memory' or a"
    ):
        SavedTensorStore(shard=shard)


def test_sharding_goes_by_the_hashes_of_dedupe() -> None:
    with pytest.raises(ValueError, match="drop dedupe=False"):
        SavedTensorStore(shard=True, dedupe=False)
