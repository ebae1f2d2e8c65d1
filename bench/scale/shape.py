"""LLaMAs by their shape, of random weights, made in bfloat16 and never wider."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

_SPREAD = 0.02
_CONTEXT = 512


@dataclass(frozen=True)
class Shape:
    """A LLaMA's sizes."""

    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_key_heads: int
    vocabulary: int = 32_000

    def config(self) -> LlamaConfig:
        """Return what Transformers builds it from."""
        return LlamaConfig(
            hidden_size=self.width,
            intermediate_size=self.mlp_width,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_key_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=_CONTEXT,
            attn_implementation="sdpa",
            architectures=["LlamaForCausalLM"],
            dtype="bfloat16",
        )

    @property
    def num_clustered(self) -> int:
        """Weights of one decoder layer's linears."""
        attention = 2 * self.width**2 * (self.num_heads + self.num_key_heads) // self.num_heads
        return attention + 3 * self.width * self.mlp_width

    @property
    def num_norms(self) -> int:
        """Weights of all norms."""
        return (2 * self.num_layers + 1) * self.width

    @property
    def num_weights(self) -> int:
        """Weights of the whole model."""
        return self.num_layers * self.num_clustered + 2 * self.vocabulary * self.width + self.num_norms

    def layer(self) -> nn.Module:
        """Return one decoder layer."""
        with _in_bfloat16():
            return _filled(LlamaDecoderLayer(self.config(), 0))

    def norm(self) -> nn.Module:
        """Return the norm behind the last layer."""
        with _in_bfloat16():
            return _filled(LlamaRMSNorm(self.width))

    def embedding(self) -> nn.Module:
        """Return the embedding of the tokens."""
        with _in_bfloat16():
            return _filled(nn.Embedding(self.vocabulary, self.width))

    def head(self) -> nn.Module:
        """Return the linear that makes logits."""
        with _in_bfloat16():
            return _filled(nn.Linear(self.width, self.vocabulary, bias=False))

    def model(self) -> LlamaForCausalLM:
        """Return a whole model."""
        with _in_bfloat16():
            model = LlamaForCausalLM(self.config())
        _filled(model)
        return model


LLAMA_1B = Shape(width=2048, mlp_width=5632, num_layers=22, num_heads=32, num_key_heads=4)
LLAMA_7B = Shape(width=4096, mlp_width=11008, num_layers=32, num_heads=32, num_key_heads=32)


@contextmanager
def _in_bfloat16() -> Iterator[None]:
    # Transformers would draw each weight in fp32 first.
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with no_init_weights():
            yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def _filled(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=_SPREAD)
        else:  # fresh norms are all ones, which no trained model's are
            parameter.uniform_(0.5, 1.5)
    return module
