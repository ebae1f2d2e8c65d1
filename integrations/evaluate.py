"""Evaluation: the stream protocol, and the loss on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

from integrations.corpus import Row, StreamCorpus
from integrations.directory import disk_bytes
from integrations.errors import CommandError
from integrations.loss import num_targets, summed_loss
from integrations.palettized import load_model
from integrations.text import Tokenizer, read_utf8
from integrations.transformers import load_tokenizer, local_directory, model_context

STREAM_CONTEXT = 256
_ROWS_A_BATCH = 16


@dataclass(frozen=True)
class StreamScore:
    """What a text costs a model.

    Arguments:
        perplexity: exp of the mean loss of a token.
        bits_per_byte: bits to code a byte of the text.
        num_tokens: tokens scored.
    """

    perplexity: float
    bits_per_byte: float
    num_tokens: int


def score_stream(model: nn.Module, text: str, *, tokenizer: Tokenizer, max_context: int) -> StreamScore:
    """Score a text by the stream protocol: blocks of context - 1 tokens behind a BOS, each token scored once.

    Arguments:
        model: a causal language model, scored as it is.
        text: taken as one string and stripped.
        tokenizer: the model's.
        max_context: the longest context that the model was made for; at most 256 tokens are used.

    Raises:
        CommandError: the text is shorter than one block.
    """
    content = text.strip()
    context = min(max_context, STREAM_CONTEXT)
    tokens = torch.tensor(tokenizer.encode([content])[0], dtype=torch.int32)
    if len(tokens) < context - 1:
        raise CommandError(
            f"the text has {len(tokens)} tokens; one block of {context - 1} is the least to score"
        )
    blocks = StreamCorpus(tokens, bos=tokenizer.bos, context=context).cut(0.0)
    loss = _loss_of_all(model, blocks)
    return StreamScore(
        perplexity=math.exp(loss / len(tokens)),
        bits_per_byte=loss / math.log(2) / len(content.encode()),
        num_tokens=len(tokens),
    )


def evaluate(name: str, text: Path) -> dict[str, Any]:
    """Score a file under a model, dense or palettized.

    Arguments:
        name: model directory or hub name.
        text: plain text.

    Returns:
        `perplexity`, `bits_per_byte`, `num_tokens` and `disk_bytes`, the size of the weight files.

    Raises:
        CommandError: the model or the text cannot be read, or the text is shorter than one block.
    """
    content = read_utf8(text)
    if not content.strip():
        raise CommandError(f"{text} is empty: there is nothing to score")
    tokenizer = load_tokenizer(name)
    model = load_model(name)
    score = score_stream(model, content, tokenizer=tokenizer, max_context=model_context(name))
    return {**asdict(score), "disk_bytes": disk_bytes(local_directory(name))}


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
