"""However the ranks share a model, and whoever of them is killed, the run ends where one rank's would."""

import copy
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bench.ranks import run_ranks
from edkm import DKMConfig, cluster
from integrations.checkpoint import Checkpoints
from integrations.corpus import Sampler
from integrations.errors import InterruptedRunError
from integrations.finetune import finetune
from integrations.loss import Distillation
from integrations.parallel import Replicated, Sharded
from integrations.ranks import Ranks
from integrations.recipe import Destination, Recipe
from integrations.train import Schedule, Training
from integrations.transformers import load_dense
from tests.integrations.test_finetune import files, stop_at
from tests.integrations.test_ranks import environment
from tests.integrations.test_train import corpus

NUM_STEPS = 11
NUM_SAVED_STEPS = 1
LAYOUTS = ("ddp", "fsdp")


def training(model: str, *, dtype: str, layout: str) -> Training:
    """Return a run whose batches leave some rank without rows."""
    weights = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    loaded = load_dense(model, dtype=weights)
    loss = Distillation(copy.deepcopy(loaded), fraction=0.5)
    clustering = cluster(loaded, DKMConfig(bits=3, embedding_bits=6, num_steps=NUM_STEPS))
    parallel: Replicated | Sharded
    if layout == "fsdp":
        compute = torch.bfloat16 if dtype == "mixed" else None
        parallel = Sharded(loaded, ranks=Ranks(), dtype=compute)
    else:
        parallel = Replicated(loaded, ranks=Ranks(), autocast=dtype == "mixed")
    return Training(
        loaded,
        clustering,
        sampler=Sampler(corpus(), batch_size=3, seed=0),
        schedule=Schedule(NUM_STEPS, learning_rate=0.01, num_accumulated=2),
        parallel=parallel,
        loss=loss,
    )


def losses(run: Training, *, checkpoints: Checkpoints | None = None) -> list[float]:
    """Return the losses of the steps to come, then those held out; one of the steps leaves a checkpoint."""
    found = []
    while run.num_done < NUM_STEPS:
        found.append(run.step().loss)
        if checkpoints and run.num_done == NUM_SAVED_STEPS:
            checkpoints.save(run.state_dict(), step=NUM_SAVED_STEPS)
    return [*found, *run.held_out_losses(corpus().cut(0.0)).values()]


def checkpoints_in(folder: Path, *run: str) -> Checkpoints:
    return Checkpoints(folder / " ".join(run), settings={}, num_kept=1, ranks=Ranks())


def write_losses(rank: int, model: str, folder: str, *dtypes: str) -> None:
    found = {
        f"{dtype} {layout}": losses(
            training(model, dtype=dtype, layout=layout),
            checkpoints=checkpoints_in(Path(folder), dtype, layout),
        )
        for dtype in dtypes
        for layout in LAYOUTS
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize(("num_ranks", "dtypes"), [(2, ("float32", "bfloat16", "mixed")), (4, ("float32",))])
def test_losses_are_those_of_one_rank_that_may_go_on(
    num_ranks: int, dtypes: tuple[str, ...], tiny_model: Path, tmp_path: Path
) -> None:
    run_ranks(f"{__name__}:write_losses", str(tiny_model), str(tmp_path), *dtypes, num_ranks=num_ranks)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(num_ranks)]
    assert all(rank == ranks[0] for rank in ranks)
    for dtype in dtypes:
        alone = losses(training(str(tiny_model), dtype=dtype, layout="alone"))
        while_training, held_out = (1e-5, 0.02) if dtype == "float32" else (0.05, 0.05)
        for layout in LAYOUTS:
            found = ranks[0][f"{dtype} {layout}"]
            assert found[:NUM_STEPS] == pytest.approx(alone[:NUM_STEPS], rel=while_training)
            assert found[NUM_STEPS:] == pytest.approx(alone[NUM_STEPS:], rel=held_out)
            if dtype == "float32":
                resumed = training(str(tiny_model), dtype=dtype, layout="alone")
                state = checkpoints_in(tmp_path, dtype, layout).load(resumed.state_dict())
                resumed.load_state_dict(state)
                going_on = losses(resumed)[: NUM_STEPS - NUM_SAVED_STEPS]
                assert going_on == pytest.approx(found[NUM_SAVED_STEPS:NUM_STEPS], rel=1e-5)


class Forked(nn.Module):
    """A rank reaches the part of its own number; the last part nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(4))
        self.trunk = nn.Linear(2, 2, bias=False)

    def forward(self, x: torch.Tensor, *, part: int) -> torch.Tensor:
        return self.parts[part](self.trunk(x))


def check_unreached(rank: int) -> None:
    torch.manual_seed(0)
    model = Forked()
    plain = copy.deepcopy(model)
    parallel = Replicated(model, ranks=Ranks())
    x = torch.randn(3, 2)
    for _ in range(2):
        for is_last in (False, True):
            parallel.backward(model(x, part=rank).sum(), is_last=is_last)
            for part in range(dist.get_world_size()):
                plain(x, part=part).sum().backward()
        parallel.finish()
        for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(found.grad, expected.grad)
        assert model.parts[3].weight.grad is None
        model.zero_grad(set_to_none=True)
        plain.zero_grad(set_to_none=True)


def test_a_weight_that_one_rank_reaches_is_summed_and_one_that_none_does_is_left(tmp_path: Path) -> None:
    run_ranks(f"{__name__}:check_unreached", num_ranks=3)


def recipe_in(folder: Path, model: str) -> Recipe:
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("".join(f"Line {number} of a text to learn from. " for number in range(60)))
    return Recipe(model=model, data=text, steps=6, batch_size=3, embedding_bits=6, dtype="bfloat16")


def run_parts(rank: int, model: str, folder: str) -> None:
    """One run in one piece and one that is stopped, for each way to share the model."""
    place = Path(folder)
    for layout in LAYOUTS:
        recipe = replace(recipe_in(place, model), parallel=layout)
        finetune(recipe, Destination(place / layout))
        stop_on_first(rank, recipe, place / f"{layout}-stopped")
        finetune(replace(recipe, dense=True), Destination(place / f"{layout}-dense"))
    for layout, other in (LAYOUTS, LAYOUTS[::-1]):
        recipe = replace(recipe_in(place, model), parallel=layout)
        finetune(recipe, Destination(place / f"{layout}-stopped", resume=True))
        # What the run in one piece came to is palettized again, by the other layout.
        reopen(rank, place / layout, place / f"{layout}-as-{other}")
        finetune(replace(recipe, parallel=other), Destination(place / f"{layout}-as-{other}", resume=True))


def stop_on_first(rank: int, recipe: Recipe, output: Path) -> None:
    """One rank has the signal; all of them stop after the same step."""
    if rank == 0:
        stop_at(3, recipe, Destination(output))
    else:
        with pytest.raises(InterruptedRunError, match="after step 3"):
            finetune(recipe, Destination(output))


def reopen(rank: int, finished: Path, output: Path) -> None:
    if rank == 0:
        shutil.copytree(finished / "checkpoints", output / "checkpoints")
    dist.barrier()


def test_a_checkpoint_is_every_layouts_and_its_palettes_are_the_same_bytes(
    tiny_model: Path, tmp_path: Path
) -> None:
    recipe = recipe_in(tmp_path, str(tiny_model))
    run_ranks(f"{__name__}:run_parts", str(tiny_model), str(tmp_path), num_ranks=2)
    for layout, other in (LAYOUTS, LAYOUTS[::-1]):
        unbroken = files(tmp_path / layout)
        assert files(tmp_path / f"{layout}-stopped") == unbroken
        assert files(tmp_path / f"{layout}-as-{other}") == unbroken
        alone = tmp_path / f"{layout}-alone"
        shutil.copytree(tmp_path / layout / "checkpoints", alone / "checkpoints")
        finetune(recipe, Destination(alone, resume=True))
        assert files(alone) == unbroken
    control, sharded = (tmp_path / f"{layout}-dense" for layout in LAYOUTS)
    assert (sharded / "config.json").read_bytes() == (control / "config.json").read_bytes()
    # As far apart as gradients summed in bf16 and in fp32, and no further.
    weights = [load_dense(str(path)).state_dict() for path in (control, sharded)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0.05, atol=0.02)


class Job:
    """Ranks of `edkm finetune` that no launcher watches."""

    def __init__(self, arguments: list[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "edkm", "finetune", *arguments],
                env=environment()
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
                | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]

    def ends(self) -> list[tuple[int, str]]:
        """Return exit code and words of each rank."""
        said = [rank.communicate(timeout=120)[1] for rank in self.ranks]
        return [(rank.returncode, words) for rank, words in zip(self.ranks, said, strict=True)]


def test_a_run_whose_rank_is_killed_goes_on_from_its_last_checkpoint(
    tiny_model: Path, tmp_path: Path
) -> None:
    recipe = recipe_in(tmp_path, str(tiny_model))
    arguments = ["--model", recipe.model, "--data", str(recipe.data), "--parallel", "fsdp", "--resume"]
    arguments += ["--steps", "30", "--batch-size", "3", "--checkpoint-interval", "2", "--dtype", "mixed"]
    output = tmp_path / "killed"
    last = output / "checkpoints" / "last.json"
    job = Job([*arguments, "--output", str(output)])
    while not last.exists():
        assert job.ranks[0].poll() is None, job.ends()
        time.sleep(0.01)
    # The one that writes the checkpoints, and where the ranks met.
    job.ranks[0].kill()
    (killed, _), (code, words) = job.ends()
    assert killed == -signal.SIGKILL
    assert code == 1, words
    assert "edkm: error: another rank stopped" in words
    assert "Traceback" not in words
    assert not (output / "config.json").exists()
    for name in ("killed", "unbroken"):
        job = Job([*arguments, "--output", str(tmp_path / name)])
        assert [code for code, _ in job.ends()] == [0, 0]
    assert files(output) == files(tmp_path / "unbroken")
