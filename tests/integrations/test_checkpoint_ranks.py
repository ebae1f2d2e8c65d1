"""Ranks write a checkpoint together: read back over other shards, and whole or not there whoever fails."""

import os
import random
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from bench.ranks import run_ranks
from integrations.checkpoint import Checkpoints
from integrations.errors import CommandError
from integrations.ranks import Ranks

NUM_RANKS = 3


def checkpoints(directory: Path) -> Checkpoints:
    return Checkpoints(directory, settings={}, num_kept=2, ranks=Ranks())


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """Return tensors that three ranks cannot part evenly, and some that leave ranks without any of them."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {"uneven": (7, 5), "few rows": (2, 6), "one row": (1, 4), "bf16": (8, 3)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in drawn.items()}
    return made | {
        "bf16": made["bf16"].bfloat16(),
        "count": torch.tensor(2**40 + seed),
        "step": torch.tensor(float(seed)),
    }


def sharded(whole: dict[str, torch.Tensor], placement: Placement) -> dict[str, torch.Tensor]:
    """Return matrices over all ranks, and what is no matrix as it is: on each of them."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        name: distribute_tensor(tensor, mesh, [placement]) if tensor.ndim else tensor
        for name, tensor in whole.items()
    }


def write(rank: int, folder: str) -> None:
    directory = Path(folder)
    torch.manual_seed(rank)
    random.seed(rank)
    checkpoints(directory).save({**sharded(tensors(1), Shard(0)), "notes": {"x": 1}}, step=1)
    expected = torch.rand(()), random.random()
    for placement in (Shard(0), Shard(1), Replicate()):
        found = sharded(tensors(9), placement)
        assert checkpoints(directory).load(found) == {"notes": {"x": 1}}
        assert (torch.rand(()), random.random()) == expected
        for name, tensor in sharded(tensors(1), placement).items():
            local = found[name].to_local() if tensor.ndim else found[name]
            assert torch.equal(local, tensor.to_local() if tensor.ndim else tensor), name
    fail_on_last(rank, directory)
    kill_last(rank, directory)


def fail_on_last(rank: int, directory: Path) -> None:
    """Every rank says what one of them met, and can go on."""

    def fail(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if rank == NUM_RANKS - 1:
            patch.setattr("os.fsync", fail)
        with pytest.raises(CommandError, match=r"of step 2: \[Errno 28\] No space .* \(on rank 2\)"):
            checkpoints(directory).save(sharded(tensors(2), Shard(0)), step=2)
    dist.barrier()
    assert sorted(path.name for path in directory.iterdir()) == ["last.json", "step-00000001"]


def kill_last(rank: int, directory: Path) -> None:
    """It dies with its file written, before it is synced: nothing marks what is there as a checkpoint."""
    if rank == NUM_RANKS - 1:
        os.fsync = lambda _file: os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError, match="gloo"):
        checkpoints(directory).save(sharded(tensors(3), Shard(0)), step=3)
    # At the interpreter's end a thread of the broken group may abort.
    os._exit(0)


def test_what_ranks_wrote_together_is_read_over_other_shards_and_by_one(tmp_path: Path) -> None:
    run_ranks(f"{__name__}:write", str(tmp_path), num_ranks=NUM_RANKS, killed=frozenset({NUM_RANKS - 1}))
    assert (tmp_path / ".partial-step-00000003").is_dir()
    found = tensors(9)
    assert checkpoints(tmp_path).load(found) == {"notes": {"x": 1}}
    for name, tensor in tensors(1).items():
        assert torch.equal(found[name], tensor), name
    checkpoints(tmp_path).save(found, step=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.json", "step-00000001", "step-00000003"]
