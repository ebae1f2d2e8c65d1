"""A palette gives back what it was made of, whole and by rows, and refuses parts that do not fit."""

import pytest
import torch

from edkm import Palette, PaletteError, PalettizedEmbedding, PalettizedLinear
from edkm.packing import pack


def snapped(weight: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Distance of each vector to its nearest centroid, by the definition."""
    num_groups, _, length = centroids.shape
    rows = weight.double().reshape(num_groups, -1, length)
    return torch.cdist(rows, centroids.to(weight.dtype).double()).amin(2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("groups", "length"), [(1, 1), (1, 2), (3, 1), (3, 4)])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_each_vector_becomes_its_nearest_centroid(
    dtype: torch.dtype, groups: int, length: int, bits: int
) -> None:
    weight, centroids = torch.randn(9, 20).to(dtype), torch.randn(groups, 1 << bits, length)
    palette = Palette.snap(weight, centroids)
    decoded = palette.decode()
    assert decoded.dtype == dtype
    assert palette.bits == bits
    assert palette.indices.nbytes == bits * -(-(180 // length) // 8)
    assert palette.num_bytes == palette.indices.nbytes + palette.table.nbytes
    distance = (decoded - weight).double().reshape(groups, -1, length).norm(dim=2)
    torch.testing.assert_close(
        distance, snapped(weight, centroids), rtol=1e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-6
    )
    ids = torch.tensor([[0, 8], [3, 3]])
    assert torch.equal(palette.rows(ids), decoded[ids])
    more_than_it_has = torch.arange(30).view(2, 15) % decoded.shape[0]
    assert torch.equal(palette.rows(more_than_it_has), decoded[more_than_it_has])
    assert torch.equal(Palette.snap(decoded, centroids).decode(), decoded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_weight_of_more_values_than_there_are_patterns(dtype: torch.dtype) -> None:
    weight, centroids = torch.randn(600, 500).to(dtype), torch.randn(3, 8, 1)
    palette = Palette.snap(weight, centroids)
    rows, snapped = (each.view(3, -1, 1).double() for each in (weight, palette.decode()))
    distance = (rows - centroids.to(dtype).double().transpose(1, 2)).abs()
    assert torch.equal((rows - snapped).abs(), distance.amin(2, keepdim=True))


def test_a_weight_of_one_value_and_negative_zero() -> None:
    weight = torch.full((3, 5), -0.0)
    decoded = Palette.snap(weight, torch.full((1, 2, 1), -0.0)).decode()
    assert torch.equal(decoded.view(torch.int32), weight.view(torch.int32))


def test_transposed_and_expanded_weights() -> None:
    centroids = torch.tensor([-1.0, 0.0, 1.0, 2.0]).view(1, 4, 1)
    for weight in (torch.randn(6, 4).t(), torch.randn(1, 6).expand(4, 6)):
        plain = Palette.snap(weight.clone().contiguous(), centroids)
        assert torch.equal(Palette.snap(weight, centroids).decode(), plain.decode())


def test_counts_are_those_of_the_indices() -> None:
    weight = torch.tensor([[0.0, 0.1, 5.0], [5.0, 5.0, 9.0]])
    centroids = torch.tensor([5.0, 0.0, 7.0, -3.0]).view(1, 4, 1).expand(2, 4, 1)
    assert Palette.snap(weight, centroids).counts().tolist() == [[1, 2, 0, 0], [2, 0, 1, 0]]


def test_more_weights_than_are_decoded_at_a_time() -> None:
    weight = torch.randn(1025, 1024)
    decoded = Palette.snap(weight, torch.tensor([-1.0, 1.0]).view(1, 2, 1)).decode()
    assert torch.equal(decoded, weight.sign())


def test_an_unknown_row_is_refused() -> None:
    palette = Palette.snap(torch.randn(4, 6), torch.randn(1, 2, 1))
    for ids in (torch.tensor([0, 4]), torch.tensor([-1])):
        with pytest.raises(IndexError, match=r"cannot look up rows .* of 4"):
            palette.rows(ids)
    assert palette.rows(torch.empty(0, 2, dtype=torch.long)).shape == (0, 2, 6)


@pytest.mark.parametrize(
    ("table", "num_indices", "bits", "shape", "message"),
    [
        ((1, 5, 1), 24, 3, (4, 6), "an index would be out of range"),
        ((1, 8, 1), 23 - 8, 3, (4, 6), "indices of 6 bytes do not fit a weight of shape .* make 9"),
        ((3, 8, 1), 24, 3, (4, 6), "does not part into 3 groups"),
        ((1, 8, 4), 6, 3, (4, 6), "does not part into 1 groups of 4"),
        ((8,), 24, 3, (4, 6), r"got shapes \[8\]"),
    ],
)
def test_parts_that_do_not_fit(
    table: tuple[int, ...], num_indices: int, bits: int, shape: tuple[int, ...], message: str
) -> None:
    planes = pack(torch.zeros(num_indices, dtype=torch.uint8), bits=bits)
    with pytest.raises(PaletteError, match=message):
        Palette(torch.zeros(table), planes, shape=shape)


def test_parts_of_the_wrong_dtype() -> None:
    planes = pack(torch.zeros(24, dtype=torch.uint8), bits=1)
    with pytest.raises(PaletteError, match="floating-point table and uint8 indices"):
        Palette(torch.zeros(1, 2, 1), planes.int(), shape=(4, 6))
    with pytest.raises(PaletteError, match="floating-point table and uint8 indices"):
        Palette(torch.zeros(1, 2, 1, dtype=torch.int32), planes, shape=(4, 6))


@pytest.mark.parametrize("biased", [False, True])
def test_a_linear_runs_from_it(biased: bool) -> None:
    palette = Palette.snap(torch.randn(6, 8), torch.randn(1, 8, 1))
    bias = torch.nn.Parameter(torch.randn(6)) if biased else None
    linear, x = PalettizedLinear(palette, bias), torch.randn(2, 3, 8, requires_grad=True)
    assert (linear.in_features, linear.out_features) == (8, 6)
    expected = torch.nn.functional.linear(x, palette.decode(), bias)
    assert torch.equal(linear(x), expected)
    [gradient] = torch.autograd.grad(linear(x).sum(), x)
    torch.testing.assert_close(gradient, palette.decode().sum(0).expand(2, 3, 8))


def test_an_embedding_runs_from_it() -> None:
    palette = Palette.snap(torch.randn(10, 8), torch.randn(2, 8, 4))
    embedding, ids = PalettizedEmbedding(palette, padding_idx=0), torch.randint(0, 10, (3, 4))
    assert (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx) == (10, 8, 0)
    assert torch.equal(embedding(ids), torch.nn.functional.embedding(ids, palette.decode()))
    assert torch.equal(embedding(ids.int()), embedding.weight[ids])


def test_it_moves_and_casts_with_its_module_and_says_what_it_is() -> None:
    linear = PalettizedLinear(Palette.snap(torch.randn(6, 8), torch.randn(1, 8, 1)))
    assert linear.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert "shape=(6, 8), bits=3" in repr(linear)
