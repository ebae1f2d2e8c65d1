"""The stream protocol, against a float64 reading of it, and the figure it must give."""

import json
import math
from pathlib import Path

import pytest
import torch

from edkm import DKMConfig, palettize
from edkm.palette import Palette
from integrations.commands import main
from integrations.corpus import Row
from integrations.errors import CommandError
from integrations.evaluate import held_out_loss, num_stored, score_stream
from integrations.loss import num_targets, summed_loss
from integrations.transformers import HubTokenizer, load_dense


def reference_nats(model: torch.nn.Module, tokens: list[int]) -> list[float]:
    """The loss of every token but the first, one row, float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens])).logits[0].double()
    chosen = logits.log_softmax(-1)[range(len(tokens) - 1), tokens[1:]]
    return (-chosen).tolist()


def test_every_token_is_scored_once_behind_a_bos(tiny_model: Path, tokenizer: HubTokenizer) -> None:
    model = load_dense(str(tiny_model))
    text = "\n  To be, or not to be: 'tis näive.\n" * 5 + "  "
    stream = tokenizer.encode([text.strip()])[0]
    blocks = [stream[start : start + 31] for start in range(0, len(stream), 31)]
    total = sum(sum(reference_nats(model, [tokenizer.bos, *block])) for block in blocks)
    score = score_stream(model, text, tokenizer=tokenizer, max_context=32)
    assert score.num_tokens == len(stream)
    assert math.isclose(score.perplexity, math.exp(total / len(stream)), rel_tol=1e-5)
    assert math.isclose(score.bits_per_byte, total / math.log(2) / len(text.strip().encode()), rel_tol=1e-5)


def test_at_most_256_tokens_of_context_are_used(tiny_model: Path, tokenizer: HubTokenizer) -> None:
    model = load_dense(str(tiny_model))
    text = "abc " * 200
    scores = [score_stream(model, text, tokenizer=tokenizer, max_context=limit) for limit in (256, 4096)]
    assert scores[0] == scores[1]


def test_prompts_and_padding_carry_no_loss(tiny_model: Path) -> None:
    model = load_dense(str(tiny_model))
    rows = [Row(torch.tensor([0, 5, 9, 7, 8]), num_prompt=3), Row(torch.tensor([0, 4, 4]))]
    expected = sum(reference_nats(model, [0, 5, 9, 7, 8])[2:]) + sum(reference_nats(model, [0, 4, 4]))
    assert math.isclose(float(summed_loss(model, rows).detach()), expected, rel_tol=1e-5)
    assert num_targets(rows) == 4
    assert math.isclose(held_out_loss(model, rows), expected / 4, rel_tol=1e-5)


def test_evaluation_leaves_the_mode_as_it_was(tiny_model: Path) -> None:
    model = load_dense(str(tiny_model))
    for mode in (True, False):
        torch.nn.Module.train(model, mode)
        held_out_loss(model, [Row(torch.tensor([0, 5]))])
        assert model.training is mode


def test_a_text_shorter_than_a_block_is_refused(tiny_model: Path, tokenizer: HubTokenizer) -> None:
    model = load_dense(str(tiny_model))
    with pytest.raises(CommandError, match="has 30 tokens; one block of 31 is the least"):
        score_stream(model, "x" * 30, tokenizer=tokenizer, max_context=32)
    assert score_stream(model, "x" * 31, tokenizer=tokenizer, max_context=32).num_tokens == 31


@pytest.mark.parametrize("value", [math.nan, 1e5])
def test_a_loss_that_is_no_figure_is_refused(value: float, tiny_model: Path, tokenizer: HubTokenizer) -> None:
    model = load_dense(str(tiny_model))
    torch.nn.init.eye_(model.model.embed_tokens.weight)
    with torch.no_grad():
        model.model.norm.weight.fill_(value)
    with pytest.raises(CommandError, match=r"the loss is .* nats a token; are the weights damaged\?"):
        score_stream(model, "To be, or not to be: that is the question.", tokenizer=tokenizer, max_context=32)


def test_the_known_figure_of_a_real_model(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shared_data / "models" / "stories260K-hf"
    text = shared_data / "text" / "tinystories_val.txt"
    assert main(["eval", "--model", str(model), "--text", str(text), "--json"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert result.keys() == {
        *("perplexity", "bits_per_byte", "num_tokens", "tokens_per_second"),
        *("bits_per_weight", "disk_bytes"),
    }
    assert round(result["perplexity"], 4) == 5.0008
    assert round(result["bits_per_byte"], 4) == 1.1337
    assert result["num_tokens"] == 193_790
    assert result["disk_bytes"] == (model / "model.safetensors").stat().st_size


def test_stored_bytes_count_what_is_shared_once(tiny_model: Path) -> None:
    dense = load_dense(str(tiny_model), dtype=torch.float32)
    num_weights = sum(each.numel() for each in dense.parameters())  # the tied head is no second weight
    assert num_stored(dense) == (4 * num_weights, num_weights)
    packed = palettize(dense, DKMConfig(bits=3, embedding_bits=8))
    palettes = {module for module in packed.modules() if isinstance(module, Palette)}
    num_bytes = sum(palette.num_bytes for palette in palettes)
    left = sum(each.nbytes for each in packed.parameters())
    assert num_stored(packed) == (num_bytes + left, num_weights)
