"""The loss of a causal language model on rows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from integrations.corpus import Row

_NO_LOSS = -100


class Loss(Protocol):
    """What training makes small."""

    def __call__(self, model: nn.Module, rows: Sequence[Row], /) -> torch.Tensor:
        """The loss of a batch summed over all tokens that carry loss, 0-d fp32, in nats."""


class Distillation:
    """A mixture of the cross entropy and of the divergence from what a teacher predicts (Hinton et al. 2015).

    Arguments:
        teacher: predicts the same tokens; frozen here, and every rank holds it whole.
        fraction: of the divergence in the sum, 0 to 1.
    """

    def __init__(self, teacher: nn.Module, *, fraction: float) -> None:
        self._teacher = teacher.eval().requires_grad_(requires_grad=False)
        self._fraction = fraction

    def __call__(self, model: nn.Module, rows: Sequence[Row], /) -> torch.Tensor:
        """The mixture of a batch, summed over all tokens that carry loss, 0-d fp32, in nats."""
        tokens, targets = _padded(rows, device=next(model.parameters()).device)
        predicted = _logits(model, tokens)
        with torch.no_grad():
            taught = _logits(self._teacher, tokens)
        learnt = targets != _NO_LOSS
        divergence = F.kl_div(
            predicted[learnt].log_softmax(-1),
            taught[learnt].log_softmax(-1),
            log_target=True,
            reduction="sum",
        )
        return self._fraction * divergence + (1.0 - self._fraction) * _cross_entropy(predicted, targets)


def summed_loss(model: nn.Module, rows: Sequence[Row], /) -> torch.Tensor:
    """Summed cross entropy of a batch, prompts and padding left out.

    Arguments:
        model: a causal language model of Transformers.
        rows: the batch; shorter rows are padded on the right, where causal attention does not look.

    Returns:
        The sum over all tokens that carry loss, fp32, in nats.
    """
    tokens, targets = _padded(rows, device=next(model.parameters()).device)
    return _cross_entropy(_logits(model, tokens), targets)


def num_targets(rows: Sequence[Row]) -> int:
    """How many tokens of a batch carry loss."""
    return sum(len(row.tokens) - row.num_prompt for row in rows)


def _padded(rows: Sequence[Row], *, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `[B, T]` and, flat, what each is to predict: `[B * (T - 1)]`, `_NO_LOSS` where nothing."""
    length = max(len(row.tokens) for row in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), _NO_LOSS)
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = row.tokens
        labels[index, row.num_prompt : len(row.tokens)] = row.tokens[row.num_prompt :]
    return tokens.to(device), labels[:, 1:].flatten().to(device)


def _logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Of all tokens but the last of each row: `[B * (T - 1), V]` fp32."""
    logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits[:, :-1].flatten(0, 1).float()


def _cross_entropy(predicted: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(predicted, targets, ignore_index=_NO_LOSS, reduction="sum")
