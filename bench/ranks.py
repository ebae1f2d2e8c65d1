"""Run a function on several ranks of one machine, each a process of its own, without torchrun."""

import faulthandler
import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
_TIMEOUT_SECONDS = 120.0


def run_ranks(
    function: str,
    *arguments: str,
    num_ranks: int,
    killed: frozenset[int] = frozenset(),
    timeout_seconds: float = _TIMEOUT_SECONDS,
) -> list[str]:
    """Run `module:function` with a rank's number and `arguments`, and return what each rank printed.

    Raises:
        AssertionError: a rank failed, or did not end in time, and then where each of its threads was. Those
            in `killed` must end by SIGKILL.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = [_start(function, arguments, rank, num_ranks, folder) for rank in range(num_ranks)]
        try:
            until = time.monotonic() + timeout_seconds
            outputs = [_output(rank, until=until) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    failed = [
        f"rank {number} ended with {rank.returncode}:\n{output}"
        for number, (rank, output) in enumerate(zip(ranks, outputs, strict=True))
        if rank.returncode != (-signal.SIGKILL if number in killed else 0)
    ]
    # All of them: the first by number is seldom the first that failed.
    assert not failed, "\n".join(failed)
    return outputs


def _start(
    function: str, arguments: tuple[str, ...], rank: int, num_ranks: int, folder: str
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench.ranks", function, str(rank), str(num_ranks), folder, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _output(rank: subprocess.Popen[str], *, until: float) -> str:
    try:
        return rank.communicate(timeout=max(0.0, until - time.monotonic()))[0]
    except subprocess.TimeoutExpired:
        rank.send_signal(signal.SIGABRT)  # which makes it say where it is
        return rank.communicate()[0]


def main(function: str, rank: str, num_ranks: str, folder: str, *arguments: str) -> None:
    """Join the group and call the function."""
    faulthandler.enable()
    store = dist.FileStore(f"{folder}/store", int(num_ranks))
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=int(num_ranks))
    module, _, name = function.partition(":")
    __import__(module)
    getattr(sys.modules[module], name)(int(rank), *arguments)
    if dist.is_initialized():
        # What a thread of gloo still holds at the interpreter's end is freed without it, and aborts.
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
