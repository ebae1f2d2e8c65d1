"""Files that are missing, truncated or edited: one typed error each, and the model as it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edkm import DKMConfig, PaletteError, load_palettized, palettize, save_palettized
from tests.edkm.models import TinyLM, tokens

WEIGHTS, MANIFEST = "palettized.safetensors", "palettized.json"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_palettized(palettize(TinyLM(), DKMConfig(bits=3, embedding_bits=8)), tmp_path / "model")
    return tmp_path / "model"


def refused(directory: Path, message: str, *, into: TinyLM | None = None) -> None:
    model, batch = into or TinyLM(), tokens()
    with torch.no_grad():
        before = model(batch)
        with pytest.raises(PaletteError, match=message) as caught:
            load_palettized(directory, into=model)
        assert torch.equal(model(batch), before)
    assert "\n" not in str(caught.value)


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / WEIGHTS)
    edit(tensors)
    save_file(tensors, directory / WEIGHTS)


def edit_manifest(directory: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((directory / MANIFEST).read_text())
    edit(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("kept_bytes", [0, 4, 100, 2000, -1])
def test_truncated(directory: Path, kept_bytes: int) -> None:
    path = directory / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept_bytes])
    refused(directory, "cannot load .*safetensors: .* missing, truncated or damaged")


def test_bytes_that_are_no_file_of_ours(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes(b"\x80\x04garbage" * 100)
    refused(directory, "missing, truncated or damaged")


@pytest.mark.parametrize("name", [WEIGHTS, MANIFEST])
def test_a_missing_file(directory: Path, name: str) -> None:
    (directory / name).unlink()
    refused(directory, f"cannot load .*{name}")


def test_an_empty_or_unknown_directory(tmp_path: Path) -> None:
    refused(tmp_path, "there is no such file; is this a palettized directory")
    refused(tmp_path / "nowhere", "there is no such file")


def test_indices_of_the_wrong_length(directory: Path) -> None:
    name = "layers.0.up_proj.palette.indices"
    edit_tensors(directory, lambda tensors: tensors.update({name: tensors[name][:, :-1].contiguous()}))
    refused(directory, r"cannot load layers\.0\.up_proj: indices of 141 bytes do not fit .* make 144")


def test_an_index_out_of_range(directory: Path) -> None:
    name = "layers.0.up_proj.palette.table"
    edit_tensors(directory, lambda tensors: tensors.update({name: tensors[name][:, :5].contiguous()}))
    refused(directory, r"cannot load layers\.0\.up_proj: a table of 5 entries .* index would be out of range")


@pytest.mark.parametrize("name", ["layers.1.o_proj.palette.table", "layers.1.norm.weight", "scale"])
def test_a_missing_tensor(directory: Path, name: str) -> None:
    edit_tensors(directory, lambda tensors: tensors.pop(name))
    refused(directory, rf"1 tensors are missing \['{name}'\]")


def test_a_tensor_too_many(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.update(extra=torch.zeros(2)))
    refused(directory, r"1 are not the model's \['extra'\]")


def test_a_dense_tensor_of_another_shape(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({"layers.1.norm.weight": torch.ones(17)}))
    refused(directory, r"cannot load layers\.1\.norm\.weight: the model has shape \[16\], the file \[17\]")


@pytest.mark.parametrize("name", ["layers.0.up_proj.palette.table", "layers.0.up_proj.palette.indices"])
def test_a_palette_of_another_dtype(directory: Path, name: str) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({name: tensors[name].to(torch.int32)}))
    refused(directory, r"cannot load layers\.0\.up_proj\.palette\.\w+: it is (I32|I16) in the file")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(version=2), "its format is 'edkm-palettized' 2, this reads 'edkm-palettized' 1"),
        (lambda m: m.pop("format"), "its format is None"),
        (lambda m: m.pop("modules"), "palettes, modules or aliases are missing"),
        (lambda m: m.update(aliases=[1]), "palettes, modules or aliases are missing"),
        (
            lambda m: m["modules"].update(lm_head="nothing"),
            "lm_head runs from 'nothing', which is",
        ),
        (lambda m: m["modules"].update(lm_head=["x"]), "which is no palette"),
        (lambda m: m["palettes"].update(embed_tokens="48x16"), "the shape of embed_tokens is '48x16'"),
        (lambda m: m["palettes"].update(embed_tokens=[48, -16]), "the shape of embed_tokens is"),
        (lambda m: m["palettes"].update(embed_tokens=[16, 48]), r"the model has shape \[48, 16\], the file"),
        (lambda m: m["modules"].pop("lm_head"), "1 tensors are missing"),
        (lambda m: m["modules"].update({"layers.7.x": "embed_tokens"}), "no linear and no embedding of that"),
        (lambda m: m["modules"].update({"layers.0.norm": "embed_tokens"}), "no linear and no embedding of"),
        (lambda m: m["aliases"].update({"scale": "nothing"}), "1 tensors are missing"),
        (lambda m: m["aliases"].update({"scale": 3}), "scale stands for 3"),
    ],
)
def test_an_edited_manifest(directory: Path, edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit_manifest(directory, edit)
    refused(directory, message)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_table_that_is_not_finite(directory: Path, value: float) -> None:
    name = "layers.0.up_proj.palette.table"
    edit_tensors(directory, lambda tensors: tensors[name][0, 3].fill_(value))
    refused(directory, f"cannot load {name}: 1 of its 8 values are NaN or infinite")


def test_a_manifest_that_is_a_folder(directory: Path) -> None:
    (directory / MANIFEST).unlink()
    (directory / MANIFEST).mkdir()
    refused(directory, "cannot load .*Is a directory")


@pytest.mark.parametrize("text", ["", "[1]", "{", "\x00", "[" * 100_000])
def test_a_manifest_that_is_no_object(directory: Path, text: str) -> None:
    (directory / MANIFEST).write_text(text)
    refused(directory, r"cannot load .*palettized\.json: it is (not json|a json list)")


@pytest.mark.parametrize("weight_map", [None, {"a": "../outside.safetensors"}, {"a": 1}])
def test_an_index_that_names_no_files(directory: Path, weight_map: object) -> None:
    (directory / "palettized.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(directory, "its weight_map does not name files beside it")


def test_a_model_of_another_shape(directory: Path) -> None:
    refused(directory, r"the model has shape \[48, 32\], the file \[48, 16\]", into=TinyLM(width=32))
    refused(directory, "tensors are missing", into=TinyLM(num_blocks=3))
    refused(directory, "no linear and no embedding", into=TinyLM(num_blocks=1))


def test_a_buffer_that_no_file_has(directory: Path) -> None:
    with torch.device("meta"):
        model = TinyLM()
        model.register_buffer("rotary", torch.zeros(4), persistent=False)
    with pytest.raises(PaletteError, match="its buffer rotary is on the meta device and no file has it"):
        load_palettized(directory, into=model)


def test_a_dense_tensor_of_another_kind(directory: Path) -> None:
    name = "layers.1.norm.weight"
    edit_tensors(directory, lambda tensors: tensors.update({name: tensors[name].int()}))
    refused(directory, r"cannot load layers\.1\.norm\.weight: it is I32 in the file, where floating point")
