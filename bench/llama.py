"""The plain LLaMA step that costs are measured on: hidden 256, 4 layers, batch 4 x 128, random weights."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM

DTYPES = ("float32", "bfloat16", "autocast")
"""Weights in fp32, weights in bf16, and fp32 weights under bf16 autocast."""

_VOCABULARY = 4096


class LlamaStep:
    """A model and a batch; each step starts on cleared gradients.

    Arguments:
        dtype: one of `DTYPES`.
        wrap: what to train the model through.
        seed: of the batch.
    """

    def __init__(
        self, dtype: str, *, wrap: Callable[[nn.Module], nn.Module] | None = None, seed: int = 0
    ) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=8,
            vocab_size=_VOCABULARY,
            max_position_embeddings=128,
        )
        self.model: nn.Module = LlamaForCausalLM(config)
        for parameter in self.model.parameters():
            if parameter.dim() == 1:  # fresh norms are all ones, which no trained model's are
                parameter.data.uniform_(0.5, 1.5)
        if dtype == "bfloat16":
            self.model.bfloat16()
        if wrap is not None:
            self.model = wrap(self.model)
        generator = torch.Generator().manual_seed(seed)
        self._tokens = torch.randint(_VOCABULARY, (4, 128), generator=generator)
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
        gradients = [each.grad for each in self.model.parameters() if each.grad is not None]
        return [getattr(each, "_local_tensor", each).clone() for each in gradients]


def plain_bytes(llama: LlamaStep) -> dict[str, int]:
    """Count what autograd saves with nothing around it: `saved` as a store that copies each save
    (`save_on_cpu`, of a tensor on a GPU) holds it, `storage` as PyTorch holds it; parameters left out.
    """
    saved, storages = [0], {}

    def pack(tensor: Tensor) -> Tensor:
        base = tensor._base
        if not isinstance(tensor, nn.Parameter) and not isinstance(base, nn.Parameter):
            tensor = getattr(tensor, "_local_tensor", tensor)
            saved[0] += tensor.nbytes
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage
        return tensor.detach()

    loss = llama.step(saved_tensors_hooks(pack, lambda tensor: tensor))
    del loss
    return {"saved": saved[0], "storage": sum(storage.nbytes() for storage in storages.values())}
