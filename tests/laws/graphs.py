"""Small graphs that save in every manner: inputs, outputs, views, masks, indices, maps.

Each returns a loss and its leaves.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Built = tuple[Tensor, list[Tensor]]


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def perceptron() -> Built:
    model = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 5), nn.Tanh())
    x = leaf(37, 13)
    return model(x).square().mean(), [x, *model.parameters()]


def attention() -> Built:
    x, qkv = leaf(2, 11, 16), leaf(16, 48)
    query, key, value = (part.view(2, 11, 4, 4).transpose(1, 2) for part in (x @ qkv).chunk(3, dim=-1))
    mask = torch.ones(11, 11).tril().bool()
    scores = (query @ key.transpose(-1, -2)).masked_fill(~mask, float("-inf"))
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(2, 11, 16)
    return F.layer_norm(mixed + x, (16,)).pow(3).sum(), [x, qkv]


def convolution() -> Built:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
    x = leaf(2, 3, 9, 7)
    return model(x).sin().sum(), [x, *model.parameters()]


def recurrence() -> Built:
    model, x = nn.LSTM(6, 10, num_layers=2), leaf(7, 3, 6)
    return model(x)[0].square().sum(), [x, *model.parameters()]


def embedding() -> Built:
    table = leaf(50, 8)
    tokens = torch.randint(50, (40, 3))
    rows = F.embedding(tokens, table)
    return F.cross_entropy(rows.flatten(0, 1) @ table.t(), tokens.flatten()), [table]


def clustering() -> Built:
    weight, centroids = leaf(900, 1, dtype=torch.bfloat16), leaf(8, 1, dtype=torch.bfloat16)
    attention = (-torch.cdist(weight, centroids).square() / 0.1).softmax(-1).clamp(min=1e-6)
    updated = attention.t() @ weight / attention.sum(0, keepdim=True).t()
    return (attention @ updated).square().sum(), [weight, centroids]


def views() -> Built:
    x, y = leaf(12, 10), leaf(10)
    wide = y.expand(12, 10)
    parts = [x * wide, x.t().contiguous().t() * x, x[::2, 1:] * x[1::2, 1:], x.unfold(1, 3, 2) ** 2]
    return sum((part.exp().mean() for part in parts), x.diagonal().prod()), [x, y]


def complex_numbers() -> Built:
    x = leaf(9, 6, dtype=torch.complex64)
    y = x.conj() * x.mH.mT + torch.view_as_real(x).exp().sum(-1) * x.conj().imag
    return (y * y.conj()).real.sum(), [x]


def selection() -> Built:
    x = leaf(33, 21)
    top = x.topk(5, dim=1).values * x.sort(dim=1).values[:, :5]
    picked = x.gather(1, torch.randint(21, (33, 4))) * x[torch.randint(33, (33,))][:, :4]
    chosen = torch.where(x > 0, x, -2 * x).cummax(0).values
    return top.sum() + picked.sum() + chosen.prod(1).sum() + x.median(), [x]


def in_place() -> Built:
    x, y = leaf(31, 17), leaf(31, 17)
    z = x * y
    z.add_(1).mul_(x)
    z[:, 1::3] *= 2
    z[0].zero_()
    z.relu_()
    return (z * y).sigmoid_().cumsum(0).pow(2).mul_(3).sum(), [x, y]


class Product(torch.autograd.Function):
    """Saves two inputs, its output, and nothing where there is None."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, y: Tensor) -> Tensor:
        product = x * y
        ctx.save_for_backward(x, None, y, product, x.t())
        return product

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, nothing, y, product, _ = ctx.saved_tensors
        assert nothing is None
        return gradient * y + product, gradient * x + ctx.saved_tensors[4].t()


def own_function() -> Built:
    x, y = leaf(23, 29), leaf(23, 29)
    return Product.apply(x, y).sin().sum(), [x, y]


def special_values() -> Built:
    values = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -3.4e38])
    x = values.repeat(60).requires_grad_()
    return (x * x + x.exp() + x.flip(0) * 3 + 1 / x).sum(), [x]


def awkward_sizes() -> Built:
    empty, scalar, single = leaf(0, 3), leaf(), leaf(1)
    return (empty * empty).sum() + scalar.exp() * single.sin().sum() + (single * scalar).sum(), [
        empty,
        scalar,
        single,
    ]


def random_noise() -> Built:
    x = leaf(64, 33)
    noise = F.rrelu(x, training=True) * F.rrelu(-x, training=True)
    return (noise * F.dropout(x, 0.5) * F.alpha_dropout(x)).sum(), [x]


GRAPHS: Mapping[str, Callable[[], Built]] = {
    build.__name__: build
    for build in (
        *(perceptron, attention, convolution, recurrence, embedding, clustering, views, complex_numbers),
        *(selection, in_place, own_function, special_values, awkward_sizes, random_noise),
    )
}
