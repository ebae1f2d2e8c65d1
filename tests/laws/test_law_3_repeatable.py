"""Law 3, repeatable: unpack works any number of times, in any order, and gives a tensor nobody else has."""

from itertools import permutations

import pytest
import torch
from torch import Tensor

from offload import SavedTensorStore
from tests.laws.graphs import GRAPHS
from tests.laws.settings import Around, bits, plain


@pytest.mark.parametrize("name", sorted(GRAPHS))
def test_backward_repeats_with_retain_graph(name: str, *, store: SavedTensorStore) -> None:
    def several(around: Around) -> list[bytes]:
        torch.manual_seed(6)
        with around:
            loss, leaves = GRAPHS[name]()
        runs = [torch.autograd.grad(loss, leaves, retain_graph=number < 2) for number in range(3)]
        return [bits(gradient) for run in runs for gradient in run]

    assert several(store) == several(plain())
    assert store.stats.held_bytes == 0


@pytest.mark.parametrize("name", sorted(set(GRAPHS) - {"recurrence", "own_function"}))
def test_second_derivatives_are_those_of_plain_autograd(name: str, *, store: SavedTensorStore) -> None:
    def second(around: Around) -> list[bytes]:
        torch.manual_seed(6)
        with around:
            loss, leaves = GRAPHS[name]()
            first = torch.autograd.grad(loss, leaves, create_graph=True)
            total = sum((part.abs().double().square().sum() for part in first), torch.zeros(()))
            again = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
        return [bits(gradient) for gradient in [*first, *again]]

    assert second(store) == second(plain())


def test_unpack_is_right_in_every_order(store: SavedTensorStore) -> None:
    x = torch.randn(64, 48)
    tensors = [x, x.t(), x.sign(), x.sign()[3:]]
    for order in permutations(range(4)):
        weights = [torch.ones(tensor.shape, requires_grad=True) for tensor in tensors]
        with store:
            outputs = [weight * tensor for weight, tensor in zip(weights, tensors, strict=True)]
        for number in (*order, *reversed(order)):
            output, weight = outputs[number], weights[number]
            (gradient,) = torch.autograd.grad(output.sum(), weight, retain_graph=True)
            assert bits(gradient) == bits(tensors[number])


class Twice(torch.autograd.Function):
    """Reads its saved tensors twice, writes into what it read first, and hands both on."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, weight: Tensor, x: Tensor, seen: list[Tensor]
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.seen = seen
        return weight * 1

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (first,), (second,) = ctx.saved_tensors, ctx.saved_tensors
        ctx.seen += [first, second]
        return gradient * second, None, None


@pytest.mark.parametrize("values", ["many", "few"])
def test_two_reads_of_saved_tensors_are_equal(values: str, *, store: SavedTensorStore) -> None:
    x = torch.randn(64, 48)[:, 1:].t()
    x = x.sign() if values == "few" else x
    seen: list[Tensor] = []
    weight = torch.ones(x.shape, requires_grad=True)
    with store:
        output = Twice.apply(weight, x, seen)
    output.sum().backward()
    assert [bits(each) for each in seen] == [bits(x)] * 2
    assert [each.stride() for each in seen] == [x.stride()] * 2
    assert bits(weight.grad) == bits(x)


def test_what_was_decoded_belongs_to_the_reader_alone() -> None:
    """A backward that writes into an encoded tensor must not change the next read."""
    x = torch.randn(64, 48).sign()
    seen: list[Tensor] = []
    weight = torch.ones(x.shape, requires_grad=True)
    with SavedTensorStore(uniquify=True, min_bytes=4096):
        output = Twice.apply(weight, x, seen)
    torch.autograd.grad(output.sum(), weight, retain_graph=True)
    seen[0].zero_(), seen[1].fill_(3)
    (gradient,) = torch.autograd.grad(output.sum(), weight)
    assert bits(gradient) == bits(x)
