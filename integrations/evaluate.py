"""Evaluation: the stream protocol, and the loss on held-out rows."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edkm import Palette
from integrations.corpus import Row, StreamCorpus
from integrations.directory import disk_bytes
from integrations.errors import CommandError
from integrations.loss import num_targets, summed_loss
from integrations.palettized import load_model
from integrations.text import Tokenizer, read_utf8
from integrations.transformers import load_tokenizer, local_directory, model_context

STREAM_CONTEXT = 256
_ROWS_A_BATCH = 16
# In nats a token: its exponential is near the largest number.
_MAX_LOSS = 700.0


@dataclass(frozen=True)
class StreamScore:
    """What a text costs a model.

    Arguments:
        perplexity: exp of the mean loss of a token.
        bits_per_byte: bits to code a byte of the text.
        num_tokens: tokens scored.
        tokens_per_second: how fast, tokenising left out.
    """

    perplexity: float
    bits_per_byte: float
    num_tokens: int
    tokens_per_second: float = field(compare=False)


def score_stream(model: nn.Module, text: str, *, tokenizer: Tokenizer, max_context: int) -> StreamScore:
    """Score a text by the stream protocol: blocks of context - 1 tokens behind a BOS, each token scored once.

    Arguments:
        model: a causal language model, scored as it is.
        text: taken as one string and stripped.
        tokenizer: the model's.
        max_context: the longest context that the model was made for; at most 256 tokens are used.

    Raises:
        CommandError: the text is shorter than one block, or the loss is no finite number.
    """
    content = text.strip()
    context = min(max_context, STREAM_CONTEXT)
    tokens = torch.tensor(tokenizer.encode([content])[0], dtype=torch.int32)
    if len(tokens) < context - 1:
        raise CommandError(
            f"the text has {len(tokens)} tokens; one block of {context - 1} is the least to score"
        )
    blocks = StreamCorpus(tokens, bos=tokenizer.bos, context=context).cut(0.0)
    began = time.perf_counter()
    loss = _loss_of_all(model, blocks)
    seconds = time.perf_counter() - began
    if not loss / len(tokens) < _MAX_LOSS:
        raise CommandError(
            f"cannot score the text: the loss is {loss / len(tokens)} nats a token; are the weights damaged?"
        )
    return StreamScore(
        perplexity=math.exp(loss / len(tokens)),
        bits_per_byte=loss / math.log(2) / len(content.encode()),
        num_tokens=len(tokens),
        tokens_per_second=round(len(tokens) / seconds, 1),
    )


def evaluate(name: str, text: Path) -> dict[str, Any]:
    """Score a file under a model, dense or palettized.

    Arguments:
        name: model directory or hub name.
        text: plain text.

    Returns:
        What `measure_model` returns, and `disk_bytes`, the size of the weight files.

    Raises:
        CommandError: the model or the text cannot be read, or the text is shorter than one block.
    """
    measured = measure_model(load_model(name), text, name=name)
    return {**measured, "disk_bytes": disk_bytes(local_directory(name))}


def measure_model(model: nn.Module, text: Path, *, name: str) -> dict[str, Any]:
    """Score a file under a model that is loaded already.

    Arguments:
        model: scored as it is.
        text: plain text.
        name: model directory or hub name, of its tokenizer and context.

    Returns:
        The fields of `StreamScore`, and `bits_per_weight` over the whole model.

    Raises:
        CommandError: the text cannot be read, or is shorter than one block.
    """
    content = read_utf8(text)
    if not content.strip():
        raise CommandError(f"{text} is empty: there is nothing to score")
    score = score_stream(model, content, tokenizer=load_tokenizer(name), max_context=model_context(name))
    num_bytes, num_weights = num_stored(model)
    return {**asdict(score), "bits_per_weight": 8 * num_bytes / num_weights}


def num_stored(model: nn.Module) -> tuple[int, int]:
    """Bytes of all that a model's files hold of it, tables included, and how many weights they stand for.

    What modules share is counted once.
    """
    palettes = {module for module in model.modules() if isinstance(module, Palette)}
    on_palettes = {id(tensor) for palette in palettes for tensor in palette.buffers()}
    stored = {id(each): each for each in model.state_dict(keep_vars=True).values()}
    dense = [each for key, each in stored.items() if key not in on_palettes]
    num_bytes = sum(each.nbytes for each in dense) + sum(palette.num_bytes for palette in palettes)
    return num_bytes, sum(each.numel() for each in dense) + sum(math.prod(p.shape) for p in palettes)


def held_out_loss(model: nn.Module, rows: Sequence[Row]) -> float:
    """Mean loss of a token over rows that are not trained on, in nats."""
    by_length = sorted(rows, key=lambda row: len(row.tokens))
    return _loss_of_all(model, by_length) / num_targets(rows)


@torch.no_grad()
def _loss_of_all(model: nn.Module, rows: Sequence[Row]) -> float:
    was_training = model.training
    model.eval()
    total = 0.0
    for _, alike in groupby(enumerate(rows), key=lambda pair: pair[0] // _ROWS_A_BATCH):
        total += float(summed_loss(model, [row for _, row in alike]))
    model.train(was_training)
    return total
