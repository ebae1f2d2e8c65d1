"""The loss of a causal language model on rows of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from integrations.corpus import Row

_NO_LOSS = -100


def summed_loss(model: nn.Module, rows: Sequence[Row]) -> torch.Tensor:
    """Summed cross entropy of a batch, prompts and padding left out.

    Arguments:
        model: a causal language model of Transformers.
        rows: the batch; shorter rows are padded on the right, where causal attention does not look.

    Returns:
        The sum over all tokens that carry loss, fp32, in nats.
    """
    length = max(len(row.tokens) for row in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), _NO_LOSS)
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = row.tokens
        labels[index, row.num_prompt : len(row.tokens)] = row.tokens[row.num_prompt :]
    device = next(model.parameters()).device
    logits = model(input_ids=tokens.to(device), use_cache=False).logits
    targets = labels[:, 1:].flatten().to(device)
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=_NO_LOSS, reduction="sum"
    )


def num_targets(rows: Sequence[Row]) -> int:
    """How many tokens of a batch carry loss."""
    return sum(len(row.tokens) - row.num_prompt for row in rows)
