"""Models come whole from a directory or not at all, and a tokenizer marks off its rows."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from integrations.errors import CommandError
from integrations.transformers import (
    HubTokenizer,
    empty_model,
    load_dense,
    load_tokenizer,
    local_directory,
    model_context,
)


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_model_comes_in_its_own_or_another_dtype(model: Path) -> None:
    change(model, dtype="bfloat16")
    save_file(
        {name: value.bfloat16() for name, value in load_file(model / "model.safetensors").items()},
        model / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert load_dense(str(model)).dtype == torch.bfloat16
    assert load_dense(str(model), dtype=torch.float32).dtype == torch.float32


def test_the_context_is_the_configurations(model: Path) -> None:
    assert model_context(str(model)) == 32


def test_a_directory_is_its_own_place(model: Path) -> None:
    assert local_directory(str(model)) == model


def test_an_empty_model_has_all_but_its_parameters(model: Path) -> None:
    empty, whole = empty_model(model), load_dense(str(model))
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert empty.lm_head.weight is empty.model.embed_tokens.weight
    buffers = dict(whole.named_buffers())
    assert buffers
    assert all(torch.equal(value, buffers[name]) for name, value in empty.named_buffers())
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"


def test_missing_weights_are_not_made_up(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    del weights[name]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CommandError, match=f"lacks 1 of the model's weights, such as {name}"):
        load_dense(str(model))


WEIGHT = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda weight: weight[:8], rf"{WEIGHT} has shape \[8, 32\] in the file, \[32, 32\] in the model"),
        (torch.Tensor.int, rf"{WEIGHT} is I32, and weights of 16 bits or more are needed"),
        (lambda weight: weight.to(torch.float8_e4m3fn), rf"{WEIGHT} is F8_E4M3, and weights of 16 bits"),
        (lambda weight: weight / 0, rf"1024 of the 1024 values of {WEIGHT} are NaN or infinite"),
        (lambda weight: weight.fill_diagonal_(torch.inf), rf"32 of the 1024 values of {WEIGHT} are NaN"),
    ],
    ids=["shape", "integers", "eight bits", "nan", "infinite"],
)
def test_a_damaged_weight_is_named(
    damage: Callable[[torch.Tensor], torch.Tensor], message: str, model: Path
) -> None:
    weights = load_file(model / "model.safetensors")
    weights[WEIGHT] = damage(weights[WEIGHT].clone()).contiguous()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CommandError, match=message):
        load_dense(str(model))


@pytest.mark.parametrize("name", ["/nowhere/llama", "llama/7b/", "../llama", "a/b/c", "config.json"])
def test_a_path_that_is_not_there_is_no_hub_name(
    name: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model)
    with pytest.raises(CommandError, match=f"{name} is neither a directory nor a name on the hub"):
        load_dense(name)


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"3",
        b"\xff",
        b"",
        *(
            json.dumps({"model_type": "llama", name: value}).encode()
            for name, value in [
                ("hidden_size", "wide"),
                ("num_attention_heads", 0),
                ("num_attention_heads", 5),
                ("hidden_size", -4),
                ("hidden_act", "nope"),
                ("dtype", "float7"),
            ]
        ),
    ],
)
def test_a_configuration_of_garbage_is_told(content: bytes, model: Path) -> None:
    (model / "config.json").write_bytes(content)
    with pytest.raises(CommandError, match="cannot load"):
        load_dense(str(model))


@pytest.mark.parametrize("kind", ["t5", "bloom"])
def test_a_context_that_is_not_told_is_asked_for(kind: str, model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(
        CommandError, match=f"max_position_embeddings is None in the configuration of a {kind}"
    ):
        model_context(str(model))
    change(model, model_type="llama", max_position_embeddings=0)
    with pytest.raises(CommandError, match="max_position_embeddings is 0"):
        model_context(str(model))


@pytest.mark.parametrize("content", [b"[]", b"garbage"])
def test_a_tokenizer_of_garbage_is_told(content: bytes, model: Path) -> None:
    (model / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(CommandError, match="cannot load the tokenizer of"):
        load_tokenizer(str(model))


def test_a_truncated_weight_file_is_told(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CommandError, match=r"cannot load .*model: "):
        load_dense(str(model))


def test_a_directory_without_weights_is_told(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(CommandError, match=r"has no weights: no \*\.safetensors file"):
        load_dense(str(model))


def test_a_directory_that_is_no_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"is not a model directory: it has no config\.json"):
        load_dense(str(tmp_path))


@pytest.mark.parametrize("kind", ["nonesuch", "vit"])
def test_an_unknown_architecture_is_told(kind: str, model: Path) -> None:
    change(model, model_type=kind)
    with pytest.raises(CommandError, match="cannot load") as caught:
        load_dense(str(model))
    assert kind in str(caught.value).lower()
    with pytest.raises(CommandError, match="cannot build the model"):
        empty_model(model)


def test_a_broken_configuration_is_told(model: Path) -> None:
    (model / "config.json").write_text("{")
    with pytest.raises(CommandError, match="cannot load"):
        model_context(str(model))


def test_a_hub_name_goes_through_transformers(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    """No network in tests: what is passed on is looked at, and what comes back is used."""
    original, asked = transformers.AutoModelForCausalLM.from_pretrained, []

    def from_pretrained(name: str, **options: object) -> object:
        asked.append((name, options["use_safetensors"], options["trust_remote_code"]))
        return original(tiny_model, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    assert load_dense("someone/some-llama").config.hidden_size == 32
    assert asked == [("someone/some-llama", True, False)]


def test_a_hub_name_lies_where_it_was_loaded_to(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    def cached_file(name: str, file: str) -> str:
        assert name == "someone/some-llama"
        return str(tiny_model / file)

    monkeypatch.setattr(transformers.utils.hub, "cached_file", cached_file)
    assert local_directory("someone/some-llama") == tiny_model


def test_a_directory_without_tokenizer_is_told(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CommandError, match=r"has no tokenizer: copy tokenizer\.json there"):
        load_tokenizer(str(model))


def test_a_tokenizer_without_bos_is_told(tiny_model: Path) -> None:
    inner = transformers.AutoTokenizer.from_pretrained(tiny_model)
    inner.bos_token = None
    with pytest.raises(CommandError, match="the tokenizer of x has no BOS or no EOS"):
        HubTokenizer(inner, name="x")


def test_a_byte_is_a_token_and_a_saved_tokenizer_the_same(tokenizer: HubTokenizer, tmp_path: Path) -> None:
    texts = ["", " Ä b\n\n\tc", "<|end|> 12 "]
    encoded = tokenizer.encode(texts)
    assert [len(tokens) for tokens in encoded] == [len(text.encode()) for text in texts]
    assert (tokenizer.bos, tokenizer.eos) == (0, 1)
    assert tokenizer.encode([]) == []
    tokenizer.save(tmp_path)
    assert load_tokenizer(str(tmp_path)).encode(texts) == encoded
