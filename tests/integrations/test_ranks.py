"""The command under torchrun: one directory, one voice, and a run that goes on with fewer ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench.ranks import ROOT


def command(*arguments: str, num_ranks: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return [sys.executable, *launcher, "-m", "edkm", "finetune", *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}


def test_the_command_on_two_ranks_writes_once_and_resumes_on_one(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {number} of a text to learn from. " for number in range(200)))
    output = tmp_path / "output"
    arguments = ["--model", str(tiny_model), "--data", str(text), "--output", str(output), "--json"]
    arguments += ["--steps", "400", "--batch-size", "4"]
    started = subprocess.Popen(
        command(*arguments, "--checkpoint-interval", "5", num_ranks=2),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(output.glob("**/last.json")):
        assert started.poll() is None, started.communicate()
        time.sleep(0.1)
    started.send_signal(signal.SIGTERM)
    said = started.communicate(timeout=100)[1]
    assert started.returncode != 0
    assert "edkm: error: interrupted after step" in said
    short = [*arguments]
    finished = subprocess.run(
        [sys.executable, "-m", "edkm", "finetune", *short, "--resume"],
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
