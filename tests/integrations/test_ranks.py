"""The command under torchrun: one directory, one voice, and a run that goes on with fewer ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bench.ranks import ROOT


def command(*arguments: str, num_ranks: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return [sys.executable, *launcher, "-m", "edkm", "finetune", *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}


def started(arguments: list[str], *, output: Path) -> subprocess.Popen[str]:
    """Return the launcher of two ranks that have written a checkpoint."""
    launcher = subprocess.Popen(
        command(*arguments, "--checkpoint-interval", "5", num_ranks=2),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(output.glob("**/last.json")):
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.1)
    return launcher


def workers(launcher: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """Return the processes of the command by rank."""
    children = psutil.Process(launcher.pid).children()
    return {int(child.environ()["RANK"]): child for child in children if "RANK" in child.environ()}


@pytest.fixture
def arguments(tiny_model: Path, tmp_path: Path) -> list[str]:
    """Return what the command is asked for: more steps than it is given time for."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {number} of a text to learn from. " for number in range(200)))
    required = ["--model", str(tiny_model), "--data", str(text), "--output", str(tmp_path / "output")]
    return [*required, "--json", "--steps", "400", "--batch-size", "4"]


def test_the_command_on_two_ranks_writes_once_and_resumes_on_one(
    arguments: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "output"
    launcher = started(arguments, output=output)
    launcher.send_signal(signal.SIGTERM)
    said = launcher.communicate(timeout=100)[1]
    assert launcher.returncode != 0
    assert said.count("edkm: error: interrupted after step") == 1, said
    finished = subprocess.run(
        [sys.executable, "-m", "edkm", "finetune", *arguments, "--resume"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    result = json.loads(finished.stdout)
    assert result["num_steps"] == 400
    assert (output / "palettized.json").is_file()


def test_a_signal_to_one_rank_stops_all_of_them_and_the_first_says_so(
    arguments: list[str], tmp_path: Path
) -> None:
    launcher = started(arguments, output=tmp_path / "output")
    # The launcher signals the other once it sees this one end: it was told already, and must not die of it.
    workers(launcher)[1].send_signal(signal.SIGTERM)
    said = launcher.communicate(timeout=100)[1]
    assert said.count("edkm: error: interrupted after step") == 1, said
