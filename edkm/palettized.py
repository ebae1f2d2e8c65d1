"""The modules that run from a palette."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from edkm.palette import Palette


class PalettizedLinear(nn.Module):
    """A linear layer that keeps its weight as a palette and decodes it for each call.

    Arguments:
        palette: of the weight, `[out_features, in_features]`; may be shared with another module.
        bias: `[out_features]` or None.
    """

    bias: nn.Parameter | None

    def __init__(self, palette: Palette, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = palette.shape
        self.palette = palette
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> torch.Tensor:
        """The snapped weight, dense, decoded anew; it has no gradient."""
        return self.palette.decode()

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name nn.Linear has
        """Apply the layer to `[..., in_features]`."""
        return F.linear(input, self.weight, self.bias)


class PalettizedEmbedding(nn.Module):
    """An embedding that keeps its weight as a palette and decodes the rows it is asked for.

    Arguments:
        palette: of the weight, `[num_embeddings, embedding_dim]`; may be shared with another module.
        padding_idx: as `nn.Embedding` has it; kept for those who ask.
    """

    def __init__(self, palette: Palette, *, padding_idx: int | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = palette.shape
        self.palette = palette
        self.padding_idx = padding_idx

    @property
    def weight(self) -> torch.Tensor:
        """The snapped weight, dense, decoded anew; it has no gradient."""
        return self.palette.decode()

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name nn.Embedding has
        """Look up token ids of any shape."""
        return self.palette.rows(input)
