"""The plain LLaMA step that costs are measured on: hidden 256, 4 layers, batch 4 x 128, random weights."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

DTYPES = ("float32", "bfloat16", "autocast")
"""Weights in fp32, weights in bf16, and fp32 weights under bf16 autocast."""

_VOCABULARY = 4096


class LlamaStep:
    """A model and a batch; each step starts on cleared gradients."""

    def __init__(self, dtype: str) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=8,
            vocab_size=_VOCABULARY,
            max_position_embeddings=128,
        )
        self.model = LlamaForCausalLM(config)
        for parameter in self.model.parameters():
            if parameter.dim() == 1:  # fresh norms are all ones, which no trained model's are
                parameter.data.uniform_(0.5, 1.5)
        if dtype == "bfloat16":
            self.model.bfloat16()
        self._tokens = torch.randint(_VOCABULARY, (4, 128))
        self._autocast = dtype == "autocast"

    def step(self, inside: AbstractContextManager[Any]) -> Tensor:
        """Run forward inside a context and return the loss."""
        self.model.zero_grad(set_to_none=True)
        autocast = torch.autocast("cpu", dtype=torch.bfloat16) if self._autocast else nullcontext()
        with inside, autocast:
            loss: Tensor = self.model(input_ids=self._tokens, labels=self._tokens).loss
        return loss

    def gradients(self) -> list[Tensor]:
        """Return the gradients of the last backward, as copies."""
        return [each.grad.clone() for each in self.model.parameters() if each.grad is not None]
