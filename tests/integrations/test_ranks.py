"""Ranks that train together do what one does: the same losses, the same palettes, one directory."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.ranks import ROOT, run_ranks
from integrations.corpus import Sampler
from integrations.parallel import Replicated
from integrations.ranks import Ranks
from integrations.train import Schedule, Training
from integrations.transformers import load_dense
from tests.integrations.test_train import corpus

NUM_STEPS = 10


def run(ranks: Ranks, model: str) -> list[float]:
    """Return the losses of a run on clustered weights whose batches leave some rank without rows."""
    from edkm import DKMConfig, cluster

    loaded = load_dense(model, dtype=torch.float32)
    training = Training(
        loaded,
        cluster(loaded, DKMConfig(bits=3, num_steps=NUM_STEPS)),
        sampler=Sampler(corpus(), batch_size=3, seed=0),
        schedule=Schedule(NUM_STEPS, learning_rate=0.01, num_accumulated=2),
        parallel=Replicated(loaded, ranks=ranks),
    )
    return [training.step().loss for _ in range(NUM_STEPS)]


def write_losses(rank: int, model: str, folder: str) -> None:
    losses = run(Ranks(), model)
    Path(folder, f"{rank}.json").write_text(json.dumps(losses))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_losses_are_those_of_one_rank(num_ranks: int, tiny_model: Path, tmp_path: Path) -> None:
    alone = run(Ranks(), str(tiny_model))
    run_ranks(f"{__name__}:write_losses", str(tiny_model), str(tmp_path), num_ranks=num_ranks)
    for rank in range(num_ranks):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(alone, rel=1e-5)


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
