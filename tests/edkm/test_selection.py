"""Which weights are chosen, and what is refused before anything is changed."""

import pytest
import torch
from torch import nn

from edkm import DKMConfig, PaletteError, cluster, palettize
from edkm.parametrization import ClusteredWeight
from edkm.selection import choose
from tests.edkm.models import TinyLM


def bits_of(model: nn.Module, config: DKMConfig) -> dict[str, int]:
    return {name: choice.bits for choice in choose(model, config) for name in choice.names}


@pytest.mark.parametrize("tied", [True, False])
def test_by_default_all_linears_but_the_head(tied: bool) -> None:
    names = bits_of(TinyLM(tied=tied), DKMConfig(bits=3))
    assert set(names) == {
        f"layers.{i}.{name}" for i in range(2) for name in ("o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert set(names.values()) == {3}


def test_a_model_without_embedding_has_no_head() -> None:
    assert set(bits_of(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), DKMConfig())) == {"0", "2"}
    assert set(bits_of(nn.Linear(4, 4), DKMConfig())) == {""}


def test_a_model_may_name_its_head() -> None:
    class Named(TinyLM):
        def get_output_embeddings(self) -> nn.Module:
            return self.layers[0].o_proj

    assert "layers.0.o_proj" not in bits_of(Named(tied=False), DKMConfig())
    assert "lm_head" in bits_of(Named(tied=False), DKMConfig())


def test_embeddings_and_head_by_choice() -> None:
    for tied in (True, False):
        names = bits_of(TinyLM(tied=tied), DKMConfig(embedding_bits=8))
        assert names["embed_tokens"] == names["lm_head"] == 8
    choices = choose(TinyLM(), DKMConfig(embedding_bits=8))
    assert [c.trained_soft for c in choices if "lm_head" in c.names] == [False]


def test_overrides_by_pattern_the_first_counts() -> None:
    config = DKMConfig(overrides={"layers.0.*_proj": None, "layers.0.o_proj": 2, "*.down_proj": 5})
    names = bits_of(TinyLM(), config)
    assert "layers.0.o_proj" not in names
    assert names["layers.1.down_proj"] == 5
    assert names["layers.1.o_proj"] == 3


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_choosing_either_of_tied_chooses_both(name: str) -> None:
    names = bits_of(TinyLM(), DKMConfig(overrides={name: 4}))
    assert names["lm_head"] == names["embed_tokens"] == 4


@pytest.mark.parametrize(
    "config",
    [
        DKMConfig(overrides={"lm_head": 4, "embed_tokens": 8}),
        DKMConfig(embedding_bits=8, overrides={"lm_head": 4}),
        DKMConfig(embedding_bits=8, overrides={"embed_tokens": None}),
    ],
)
def test_different_bits_for_tied_names_both(config: DKMConfig) -> None:
    with pytest.raises(PaletteError, match=r"tied modules .*embed_tokens: .*lm_head: .*give one"):
        cluster(TinyLM(), config)
    assert bits_of(TinyLM(tied=False), config)


def test_an_override_that_matches_nothing() -> None:
    with pytest.raises(
        PaletteError, match=r"'layers\.7\.\*' matches no linear and no embedding .* embed_tokens"
    ):
        cluster(TinyLM(), DKMConfig(overrides={"layers.7.*": 4}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["layers.1.up_proj", "embed_tokens"])
def test_a_weight_that_is_not_finite_is_named_and_nothing_changed(value: float, name: str) -> None:
    model = TinyLM()
    with torch.no_grad():
        model.get_submodule(name).weight[1, 2] = value
    before = set(model.state_dict())
    with pytest.raises(
        PaletteError, match=rf"cannot cluster {name}.*: 1 of its \d+ values are NaN or infinite"
    ):
        cluster(model, DKMConfig(embedding_bits=8))
    assert set(model.state_dict()) == before


def test_rows_that_do_not_part_into_vectors() -> None:
    with pytest.raises(PaletteError, match=r"layers\.0\.o_proj of shape \[16, 16\] by vectors of 7"):
        cluster(TinyLM(), DKMConfig(vector_length=7))


def test_as_many_groups_as_divide_the_channels_of_a_linear() -> None:
    model = palettize(TinyLM(width=16, hidden=24), DKMConfig(num_groups=12, embedding_bits=8))
    names = ("o_proj", "gate_proj", "up_proj", "down_proj")
    tables = [model.get_submodule(f"layers.0.{name}").palette.table for name in names]
    assert [table.shape[0] for table in tables] == [4, 12, 12, 4]
    assert model.lm_head.palette.table.shape == (1, 256, 1)


def test_a_weight_of_eight_bits() -> None:
    model = TinyLM()
    module = model.get_submodule("layers.0.o_proj")
    module.weight = torch.nn.Parameter(module.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(
        PaletteError, match=r"cannot cluster layers\.0\.o_proj: it is torch\.float8_e4m3fn of"
    ):
        cluster(model, DKMConfig())


def test_a_weight_without_values() -> None:
    with torch.device("meta"):
        model = TinyLM()
    with pytest.raises(PaletteError, match=r"cannot cluster layers\.0\.o_proj: it is .* on meta"):
        cluster(model, DKMConfig())


def test_a_linear_that_is_not_of_floats() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int32), requires_grad=False)
    with pytest.raises(PaletteError, match=r"cannot cluster 0: it is torch\.int32"):
        cluster(model, DKMConfig())


def test_a_module_that_does_more_than_its_weight_says() -> None:
    class Scaled(nn.Embedding):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().forward(tokens) * 8

    for embedding in (Scaled(8, 4), nn.Embedding(8, 4, max_norm=1.0)):
        with pytest.raises(PaletteError, match=r"cannot cluster 0: .* does more than Embedding"):
            cluster(nn.Sequential(embedding), DKMConfig(embedding_bits=8))


def test_nothing_to_cluster() -> None:
    for model, config in (
        (nn.ReLU(), DKMConfig()),
        (nn.Sequential(nn.Linear(2, 2)), DKMConfig(overrides={"0": None})),
    ):
        with pytest.raises(PaletteError, match="no weight to cluster"):
            cluster(model, config)


def test_a_weight_that_is_computed_is_refused_or_left_dense() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    model = nn.Sequential(nn.Linear(8, 8), normed, nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    with pytest.raises(
        PaletteError, match=r"cannot cluster 1: its weight is no parameter .* remove that first"
    ):
        cluster(model, DKMConfig())
    assert not any(isinstance(each, ClusteredWeight) for each in model.modules())
    cluster(model, DKMConfig(overrides={"[12]": None}))
    assert isinstance(model[0].parametrizations["weight"][0], ClusteredWeight)
    assert model[1] is normed
