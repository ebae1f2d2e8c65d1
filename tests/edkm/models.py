"""A small LLaMA-like model in plain torch, and what the tests of clustering share."""

import torch
import torch.nn.functional as F
from torch import nn

from edkm import Clustering

VOCABULARY = 48


class Block(nn.Module):
    """Causal mean instead of attention, then a gated MLP: the linears that matter, in little code."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.o_proj = nn.Linear(width, width, bias=False)
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=True)
        self.norm = nn.RMSNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(1, x.shape[1] + 1, dtype=x.dtype).unsqueeze(1)
        x = x + self.o_proj(x.cumsum(1) / steps)
        y = self.norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class TinyLM(nn.Module):
    """Embedding, blocks, output head; tied by default."""

    def __init__(self, *, width: int = 16, hidden: int = 24, num_blocks: int = 2, tied: bool = True) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Block(width, hidden) for _ in range(num_blocks))
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x) * self.scale.to(x.dtype)


def tokens(num_rows: int = 4, length: int = 12) -> torch.Tensor:
    """Text with a pattern: each token is the one before plus 1 or 7."""
    steps = torch.where(torch.rand(num_rows, length) < 0.8, 1, 7)
    return (torch.randint(0, VOCABULARY, (num_rows, 1)) + steps.cumsum(1)) % VOCABULARY


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean loss of a token."""
    return F.cross_entropy(model(batch)[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())


def optimizer_of(clustering: Clustering, learning_rate: float = 0.02) -> torch.optim.AdamW:
    """AdamW over the groups of a clustering."""
    return torch.optim.AdamW(clustering.parameter_groups(learning_rate))


def train(
    model: nn.Module, clustering: Clustering, *, optimizer: torch.optim.Optimizer, batches: list[torch.Tensor]
) -> list[float]:
    """Take a step on each batch; returns the losses."""
    losses = []
    for batch in batches:
        loss = loss_of(model, batch)
        loss.backward()
        clustering.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        clustering.step()
        losses.append(float(loss.detach()))
    return losses
