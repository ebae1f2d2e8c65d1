"""Palettized directories: packed without training, evaluated, made dense again, refused when damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from edkm import DKMConfig, palettize
from integrations.errors import CommandError
from integrations.evaluate import score_stream
from integrations.palettized import export_dense, load_model, palettize_directory
from integrations.transformers import HubTokenizer, load_dense


@pytest.fixture(scope="module")
def packed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny model at 3 bits, its embedding at 8."""
    directory = tmp_path_factory.mktemp("packed") / "model"
    palettize_directory(str(tiny_model), directory, bits=3, embedding_bits=8)
    return directory


@pytest.fixture
def damaged(packed: Path, tmp_path: Path) -> Path:
    """Return a copy, to damage."""
    return Path(shutil.copytree(packed, tmp_path / "damaged"))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=torch.arange(30)[None]).logits
    return result


def test_packing_is_k_means_without_training(tiny_model: Path, packed: Path) -> None:
    reference = load_dense(str(tiny_model))
    palettize(reference, DKMConfig(bits=3, embedding_bits=8))
    loaded = load_model(str(packed))
    assert torch.equal(logits(loaded), logits(reference))
    assert len(loaded.model.layers[0].mlp.up_proj.weight.unique()) == 8


def test_only_the_chosen_are_packed(tiny_model: Path, tmp_path: Path) -> None:
    palettize_directory(str(tiny_model), tmp_path / "out", bits=4, embedding_bits=None)
    weight = load_model(str(tmp_path / "out")).model.embed_tokens.weight
    assert torch.equal(weight, load_dense(str(tiny_model)).model.embed_tokens.weight)


def test_export_is_an_ordinary_directory_with_the_snapped_weights(packed: Path, tmp_path: Path) -> None:
    result = export_dense(packed, tmp_path / "dense")
    assert sorted(path.name for path in (tmp_path / "dense").glob("*.safetensors")) == ["model.safetensors"]
    dense, snapped = load_dense(str(tmp_path / "dense")), load_model(str(packed))
    assert torch.equal(dense.model.layers[0].mlp.up_proj.weight, snapped.model.layers[0].mlp.up_proj.weight)
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    torch.testing.assert_close(logits(dense), logits(snapped), rtol=1e-5, atol=1e-6)
    assert result["disk_bytes"] == (tmp_path / "dense" / "model.safetensors").stat().st_size


def test_both_kinds_score_alike(packed: Path, tmp_path: Path, tokenizer: HubTokenizer) -> None:
    export_dense(packed, tmp_path / "dense")
    scores = [
        score_stream(load_model(str(directory)), "some text " * 20, tokenizer=tokenizer, max_context=32)
        for directory in (packed, tmp_path / "dense")
    ]
    assert scores[0].perplexity == pytest.approx(scores[1].perplexity, rel=1e-5)


def test_a_dense_directory_is_not_exported(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="is not a palettized directory: there is nothing to make dense"):
        export_dense(tiny_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_palettized_one_is_not_packed_again(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CommandError, match="is palettized, and a dense model is needed: run edkm export --dense"
    ):
        palettize_directory(str(packed), tmp_path / "out", bits=3, embedding_bits=None)


def truncate(directory: Path) -> None:
    path = directory / "palettized.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "palettized.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


def shorten(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("indices"))
    tensors[name] = tensors[name][:, :-1].contiguous()


def drop_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def widen_config(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 100}))


def break_manifest(directory: Path) -> None:
    (directory / "palettized.json").write_text("{}")


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        change_tensors(shorten),
        change_tensors(lambda tensors: tensors.pop("model.norm.weight")),
        drop_config,
        widen_config,
        break_manifest,
    ],
)
def test_a_damaged_directory_is_told(damage: Callable[[Path], None], damaged: Path) -> None:
    damage(damaged)
    with pytest.raises(CommandError, match=r"\w+ .*\w+"):
        load_model(str(damaged))


@pytest.fixture
def failing_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the last file, the tokenizer's, meet a full disk."""

    def fail(*_arguments: object, **_options: object) -> None:
        raise Exception("No space left on device (os error 28)")  # what the tokenizers library raises

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", fail)


@pytest.mark.usefixtures("failing_disk")
def test_a_full_disk_leaves_nothing(tiny_model: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"cannot write .*out: .*No space left on device"):
        palettize_directory(str(tiny_model), tmp_path / "out", bits=3, embedding_bits=None)
    with pytest.raises(CommandError, match=r"cannot write .*out: .*No space left on device"):
        export_dense(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
