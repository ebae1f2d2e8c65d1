"""A run compresses, resumes to the same bits, and accounts for every row."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from integrations.checkpoint import Checkpoints
from integrations.corpus import Sampler
from integrations.demo import write_untrained
from integrations.errors import CommandError, InterruptedRunError
from integrations.evaluate import held_out_loss
from integrations.finetune import _warn_of_gap, finetune
from integrations.palettized import load_model
from integrations.ranks import Ranks
from integrations.recipe import Destination, Recipe
from integrations.text import read_training_text
from integrations.train import Training
from integrations.transformers import load_dense, load_tokenizer


@pytest.fixture
def recipe(tiny_model: Path, text: Path) -> Recipe:
    """Return a run of four short steps."""
    return Recipe(model=str(tiny_model), data=text, steps=4, batch_size=4)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_run_leaves_a_directory_that_evaluates(recipe: Recipe, tmp_path: Path) -> None:
    result = finetune(recipe, Destination(tmp_path / "out", checkpoint_interval=0))
    assert names(tmp_path / "out") == [
        "config.json",
        "palettized.json",
        "palettized.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert result["disk_bytes"] == (tmp_path / "out" / "palettized.safetensors").stat().st_size
    assert result["disk_bytes"] < 0.75 * (Path(recipe.model) / "model.safetensors").stat().st_size
    assert 0 < result["peak_held_bytes"] <= result["saved_bytes"]
    weight = load_model(str(tmp_path / "out")).model.layers[0].mlp.up_proj.weight
    assert len(weight.unique()) <= 8
    assert result["num_dead_centroids"] >= 0
    assert set(result["held_out_loss_after"]) == {"soft", "snapped"}


def test_what_is_written_has_the_reported_loss(recipe: Recipe, tmp_path: Path) -> None:
    result = finetune(recipe, Destination(tmp_path / "out", checkpoint_interval=0))
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    held_out = read_training_text(recipe.data, tokenizer, context=32).corpus.hold_out(64)[1]
    loss = held_out_loss(load_model(str(tmp_path / "out")), held_out)
    assert loss == pytest.approx(result["held_out_loss_after"]["snapped"], rel=1e-6)


def test_the_dense_control_sees_the_same_batches(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    batch = Sampler.batch

    def spy(self: Sampler) -> object:
        rows = batch(self)
        seen.extend(row.tokens for row in rows)
        return rows

    monkeypatch.setattr(Sampler, "batch", spy)
    finetune(recipe, Destination(tmp_path / "clustered", checkpoint_interval=0))
    clustered, seen[:] = list(seen), []
    result = finetune(replace(recipe, dense=True), Destination(tmp_path / "dense", checkpoint_interval=0))
    assert len(seen) == len(clustered) == 16
    assert all(torch.equal(a, b) for a, b in zip(seen, clustered, strict=True))
    assert result["held_out_loss_after"]["snapped"] < result["held_out_loss_dense"]
    assert load_dense(str(tmp_path / "dense")).dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resuming_goes_on_to_the_same_bits(dtype: str, recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(recipe, dtype=dtype, accumulate=2, batch_size=2, distill=0.5)
    unbroken = finetune(recipe, Destination(tmp_path / "a", checkpoint_interval=0))
    stop_at(2, recipe, Destination(tmp_path / "b", checkpoint_interval=0))
    assert names(tmp_path / "b") == ["checkpoints"]
    resumed = finetune(recipe, Destination(tmp_path / "b", resume=True))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    for key in set(unbroken) - {"output", "seconds"}:
        assert resumed[key] == unbroken[key], key


def stop_at(step: int, recipe: Recipe, destination: Destination) -> None:
    """Run until the signal that comes in the midst of a step."""
    with pytest.MonkeyPatch.context() as patch:
        take = Training.step

        def interrupted(self: Training) -> object:
            if self.num_done == step - 1:
                signal.raise_signal(signal.SIGTERM)
            return take(self)

        patch.setattr(Training, "step", interrupted)
        with pytest.raises(InterruptedRunError, match=f"after step {step}"):
            finetune(recipe, destination)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("bits", 4), ("steps", 5), ("learning_rate", 0.5), ("seed", 1), ("dense", True), ("context", 16)),
        ("distill", 0.5),
    ],
)
def test_a_checkpoint_of_another_configuration_names_the_field(
    field: str, value: object, recipe: Recipe, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "out" / "checkpoints"
    Checkpoints(checkpoint, settings=recipe.settings(), num_kept=1, ranks=Ranks()).save({}, step=1)
    changed = replace(recipe, **{field: value})
    before = names(checkpoint)
    with pytest.raises(CommandError, match=f"it was made with {field} .*, now {field} is {value!r}"):
        finetune(changed, Destination(tmp_path / "out", resume=True))
    assert names(checkpoint) == before


def test_a_checkpoint_of_other_text_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    before = recipe.settings()
    recipe.data.write_text(recipe.data.read_text() + "!")
    assert {key for key, value in recipe.settings().items() if value != before[key]} == {"data"}


def test_a_model_that_changed_since_is_told(recipe: Recipe, tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_untrained(model, width=32, num_layers=1, context=32)
    recipe = replace(recipe, model=str(model))
    stop_at(1, recipe, Destination(tmp_path / "out"))
    shutil.rmtree(model)
    write_untrained(model, width=64, num_layers=1, context=32)
    with pytest.raises(CommandError, match=r"does not fit .*model, which must have changed since"):
        finetune(recipe, Destination(tmp_path / "out", resume=True))


def test_resuming_without_a_checkpoint_begins_anew(recipe: Recipe, tmp_path: Path) -> None:
    """A run that was killed before its first checkpoint is started again by the same command."""
    result = finetune(recipe, Destination(tmp_path / "out", resume=True))
    assert result["num_steps"] == 4


def test_a_finished_run_is_not_resumed(recipe: Recipe, tmp_path: Path) -> None:
    destination = Destination(tmp_path / "out", resume=True, checkpoint_interval=2)
    finetune(recipe, destination)
    with pytest.raises(CommandError, match="is finished: there is nothing to resume"):
        finetune(recipe, destination)


def test_bf16_trains_and_is_written_in_bf16(recipe: Recipe, tmp_path: Path) -> None:
    finetune(replace(recipe, dtype="bfloat16"), Destination(tmp_path / "out", checkpoint_interval=0))
    tensors = load_file(tmp_path / "out" / "palettized.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16, torch.uint8}
    assert load_model(str(tmp_path / "out")).dtype == torch.bfloat16


def test_fp16_trains_in_fp32(recipe: Recipe, tmp_path: Path) -> None:
    model = load_dense(recipe.model, dtype=torch.float16)
    model.save_pretrained(tmp_path / "model")
    for path in Path(recipe.model).glob("tokenizer*"):
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    run = replace(recipe, model=str(tmp_path / "model"), steps=1, dense=True)
    finetune(run, Destination(tmp_path / "out", checkpoint_interval=0))
    assert load_dense(str(tmp_path / "out")).dtype == torch.float32


def test_the_embedding_can_be_packed_too(recipe: Recipe, tmp_path: Path) -> None:
    dense = finetune(replace(recipe, embedding_bits=None), Destination(tmp_path / "a", checkpoint_interval=0))
    packed = finetune(recipe, Destination(tmp_path / "b", checkpoint_interval=0))
    assert packed["disk_bytes"] < dense["disk_bytes"] - 258 * 32 * 2
    model = load_model(str(tmp_path / "b"))
    assert model.lm_head.palette is model.model.embed_tokens.palette


def test_instructions_are_counted(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"instruction": "Say it.", "input": "", "output": "y" * length} for length in (3, 300, 3, 3)]
    rows.append({"instruction": "x" * 400, "input": "", "output": "y"})
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    write_untrained(tmp_path / "model", width=32, num_layers=1, context=256)
    run = replace(recipe, model=str(tmp_path / "model"), data=path, steps=1)
    result = finetune(run, Destination(tmp_path / "out"))
    counts = {key: result[key] for key in ("num_rows", "num_truncated_rows", "num_dropped_rows")}
    assert counts == {"num_rows": 5, "num_truncated_rows": 1, "num_dropped_rows": 1}
    assert "of 5 rows 1 are cut off at 256 tokens and 1 have nothing to learn from" in capsys.readouterr().err


def test_a_gap_between_soft_and_snapped_warns(capsys: pytest.CaptureFixture[str]) -> None:
    _warn_of_gap({"soft": 2.0, "snapped": 2.019})
    assert capsys.readouterr().err == ""
    _warn_of_gap({"soft": 2.0, "snapped": 2.03})
    assert "snapped weights, 2.0300, is 1.5% above that of the soft ones, 2.0000" in capsys.readouterr().err


def test_a_real_model_gets_better(shared_data: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        model=str(shared_data / "models" / "stories260K-hf"),
        data=tmp_path / "stories.txt",
        steps=5,
        batch_size=2,
    )
    sample = (shared_data / "text" / "tinystories_train_sample.txt").read_text(encoding="utf-8")
    recipe.data.write_text(sample[:40_000], encoding="utf-8")
    result = finetune(recipe, Destination(tmp_path / "out", checkpoint_interval=0))
    before, after = result["held_out_loss_before"], result["held_out_loss_after"]
    assert after["snapped"] < before["snapped"]
    assert result["held_out_loss_dense"] < after["snapped"]
