"""`edkm demo`: the main job on a byte-level LLaMA that it trains first, on text that every Python carries."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import tokenizers
import torch
import transformers

from integrations.clustering_cost import clustering_cost
from integrations.evaluate import evaluate
from integrations.finetune import finetune
from integrations.palettized import palettize_directory
from integrations.recipe import Destination, Recipe

_NUM_TEST_CHARACTERS = 20_000
_NUM_TOKENS = 258
_BITS = 3
_MEMORY = ("saved_bytes", "peak_held_bytes")


def demo(directory: Path, *, base_steps: int = 500, clustered_steps: int = 100) -> dict[str, Any]:
    """Train a tiny LLaMA, pack it to 3 bits by k-means alone and by eDKM, and compare the three.

    Arguments:
        directory: where to leave the files; another name beside it is picked when it exists.
        base_steps: to train the base model.
        clustered_steps: to train it on clustered weights.

    Returns:
        `rows`, the comparison by model; `clustering`, what the plain layer and the fused one ask for;
        `directory`; `files`, what was left there; `seconds`.
    """
    began = time.monotonic()
    directory = fresh_directory(directory)
    _tell(f"the demo writes to {directory}")
    text, test_text = _write_texts(directory)
    base, packed, clustered = (directory / name for name in ("base", "kmeans", "edkm"))
    _tell(f"1 of 4: train a tiny LLaMA on Python's own help, {base_steps} steps")
    with tempfile.TemporaryDirectory() as untrained:
        write_untrained(Path(untrained))
        memory = _train(untrained, text, output=base, steps=base_steps, learning_rate=0.1, dense=True)
    _tell(f"2 of 4: pack it to {_BITS} bits by k-means")
    palettize_directory(
        str(base),
        packed,
        bits=_BITS,
        embedding_bits=Recipe.embedding_bits,
        num_groups=Recipe.num_groups,
    )
    _tell(f"3 of 4: train it on clustered weights, {clustered_steps} steps, and pack it to {_BITS} bits")
    clustered_memory = _train(str(base), text, output=clustered, steps=clustered_steps, learning_rate=0.02)
    _tell("4 of 4: score all three, and cluster by the plain layer and by the fused one")
    return {
        "rows": {
            "base, fp32": _row(base, test_text, memory),
            f"k-means, {_BITS} bits, untrained": _row(packed, test_text, {}),
            f"eDKM, {_BITS} bits, bf16": _row(clustered, test_text, clustered_memory),
        },
        "clustering": clustering_cost(str(base), bits=_BITS, dtype=torch.bfloat16),
        "directory": str(directory),
        "files": sorted(str(path) for path in directory.rglob("*") if path.is_file()),
        "seconds": round(time.monotonic() - began, 1),
    }


def _tell(text: str) -> None:
    print(f"edkm: {text}", file=sys.stderr)


def fresh_directory(wanted: Path) -> Path:
    """Make a directory of the wanted name, or with the first free number behind it where that exists."""
    for number in count(1):
        directory = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            continue
        return directory
    raise AssertionError


def table(result: Mapping[str, Any]) -> str:
    """The comparison, the files and the time, for reading."""
    lines = [f"{'':<28}{'perplexity':>11}{'on disk':>11}{'autograd asked':>16}{'store held':>12}"]
    for name, row in result["rows"].items():
        sizes = [_size(row.get(key)) for key in ("disk_bytes", *_MEMORY)]
        lines.append(f"{name:<28}{row['perplexity']:>11.3f}{sizes[0]:>11}{sizes[1]:>16}{sizes[2]:>12}")
    lines += ["", f"{'clustering alone, a step':<28}{'autograd asked':>16}{'store held':>12}{'seconds':>9}"]
    for name, cost in result["clustering"].items():
        sizes = [_size(cost[key]) for key in _MEMORY]
        lines.append(f"{name:<28}{sizes[0]:>16}{sizes[1]:>12}{cost['seconds']:>9.3f}")
    lines += ["", f"written in {result['seconds']:.0f} s:", *(f"  {file}" for file in result["files"])]
    return "\n".join(lines)


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer with one token a byte, made without any file: BOS 0, EOS 1, then the bytes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )


def write_untrained(directory: Path, *, width: int = 96, num_layers: int = 4, context: int = 128) -> None:
    """Write a byte-level LLaMA with random weights, always the same, and its tokenizer.

    Arguments:
        directory: to write into.
        width: of the hidden states, a multiple of 32; the inner width of the MLP is 8/3 of it.
        num_layers: decoder layers.
        context: the longest context, in bytes.
    """
    config = transformers.LlamaConfig(
        vocab_size=_NUM_TOKENS,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=width // 32,
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)


def _write_texts(directory: Path) -> tuple[Path, Path]:
    content = "\n\n".join(topics[name] for name in sorted(topics))
    paths = directory / "train.txt", directory / "test.txt"
    paths[0].write_text(content[:-_NUM_TEST_CHARACTERS], encoding="utf-8")
    paths[1].write_text(content[-_NUM_TEST_CHARACTERS:], encoding="utf-8")
    return paths


def _train(
    model: str, text: Path, *, output: Path, steps: int, learning_rate: float, dense: bool = False
) -> dict[str, Any]:
    # bf16 is clustered on a table of its values, in a fraction of the time.
    recipe = Recipe(
        model=model,
        data=text,
        bits=_BITS,
        dense=dense,
        steps=steps,
        learning_rate=learning_rate,
        dtype="auto" if dense else "bfloat16",
    )
    result = finetune(recipe, Destination(output, checkpoint_interval=0))
    return {key: result[key] for key in _MEMORY}


def _row(model: Path, text: Path, memory: Mapping[str, Any]) -> dict[str, Any]:
    return {**evaluate(str(model), text), **memory}


def _size(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 2**20:.2f} MiB"
