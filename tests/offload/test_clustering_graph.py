"""The reference graph of train-time clustering, small: its maps are tables by the weight itself."""

import pytest
import torch
from torch import Tensor

from offload import SavedTensorStore
from tests.laws.settings import STORES, bits, plain

NUM_ROWS, NUM_CENTROIDS = 128 * 128, 8
MAP_BYTES = NUM_ROWS * NUM_CENTROIDS * 2


def cluster(weight: Tensor, centroids: Tensor) -> Tensor:
    """One iteration of k-means as attention: distances, their squares, softmax, clamp, two matmuls."""
    distances = torch.cdist(weight.view(-1, 1), centroids)
    attention = (-distances.square() / 0.05).softmax(-1).clamp(min=0.1)
    sums = attention.t() @ weight.view(-1, 1)
    updated = sums / attention.sum(0).view(-1, 1)
    return (attention @ updated).view_as(weight)


def inputs() -> tuple[torch.nn.Parameter, Tensor]:
    torch.manual_seed(3)
    weight = torch.nn.Parameter((torch.randn(128, 128) * 0.05).bfloat16())
    return weight, torch.linspace(-0.1, 0.1, NUM_CENTROIDS).bfloat16().view(-1, 1).requires_grad_()


def gradients(around: object) -> list[bytes]:
    weight, centroids = inputs()
    with around:
        loss = cluster(weight, centroids).square().sum()
    loss.backward()
    return [bits(weight.grad), bits(centroids.grad)]


@pytest.mark.parametrize("name", sorted(STORES))
def test_gradients_are_those_of_plain_autograd(name: str) -> None:
    store = STORES[name]()
    assert gradients(store) == gradients(plain())
    assert store.stats.held_bytes == 0


def test_the_maps_are_tables_by_the_weight() -> None:
    """No index list: the weight, which is alive anyway, is the list of all its maps."""
    store = SavedTensorStore(uniquify=True)
    weight, centroids = inputs()
    with store:
        clustered = cluster(weight, centroids)
    stats = store.stats
    num_values = len(weight.detach().view(torch.int16).unique())
    assert stats.num_by_stage.get("tensor-keyed", 0) == 3, stats.num_by_stage
    table_bytes = num_values * NUM_CENTROIDS * 2
    assert stats.held_bytes <= 3 * table_bytes + num_values * 6 + 5 * centroids.nbytes
    assert stats.storage_bytes >= 3 * MAP_BYTES
    del clustered
    assert store.stats.held_bytes == 0


def test_by_content_alone_the_maps_do_not_share() -> None:
    """The maps differ in the number of their distinct rows: it is the key that finds the one list."""
    weight, centroids = inputs()
    distances = torch.cdist(weight.view(-1, 1), centroids).detach()
    attention = (-distances.square() / 0.05).softmax(-1)
    maps = [distances, attention, attention.clamp(min=0.1)]
    numbers = [len(each.unique(dim=0)) for each in maps]
    assert len(set(numbers)) > 1
    assert max(numbers) <= len(weight.detach().view(torch.int16).unique())


def test_a_row_that_is_no_function_of_the_key_is_seen() -> None:
    """One row of the second map differs from its like: the guess is dropped, and no bit is lost."""
    table = torch.randn(50, 8)
    numbers = torch.cat([torch.arange(50), torch.randint(50, (9_950,))])
    for place in (0, 51, 5_000, 9_999):
        first, second = table[numbers], table.exp()[numbers]
        second[place, 3] += 1
        weights = [torch.ones(10_000, 8, requires_grad=True) for _ in range(2)]
        with SavedTensorStore(uniquify=True) as store:
            outputs = [weight * each for weight, each in zip(weights, (first, second), strict=True)]
        assert store.stats.num_by_stage == {"rows": 2}
        for output, weight, each in zip(outputs, weights, (first, second), strict=True):
            assert torch.equal(torch.autograd.grad(output.sum(), weight)[0], each)


def test_a_key_survives_the_tensor_that_made_it() -> None:
    """The list belongs to all whose rows it numbers."""
    numbers = torch.cat([torch.arange(50), torch.randint(50, (9_950,))])
    table = torch.randn(50, 8)
    weights = [torch.ones(10_000, 8, requires_grad=True) for _ in range(2)]
    with SavedTensorStore(uniquify=True) as store:
        first = weights[0] * table[numbers]
        second = weights[1] * table.exp()[numbers]
    assert store.stats.num_by_stage == {"rows": 1, "keyed": 1}
    del first
    assert torch.equal(torch.autograd.grad(second.sum(), weights[1])[0], table.exp()[numbers])
    assert store.stats.held_bytes == 0
