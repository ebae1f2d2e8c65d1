"""The public surface is frozen: a name comes or goes here first."""

import importlib
import inspect
from types import ModuleType

import pytest

FROZEN = {
    "offload": {"RankMismatchError", "SavedTensorStore", "Stats", "StoreError", "StaleTensorError"},
    "edkm": {
        "DKMConfig",
        "Clustering",
        "dkm",
        "fused_dkm",
        "cluster",
        "palettize",
        "save_palettized",
        "load_palettized",
        "Palette",
        "PalettizedLinear",
        "PalettizedEmbedding",
        "PaletteError",
    },
    "integrations": set(),
}


@pytest.fixture(params=sorted(FROZEN))
def package(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(request.param)


def test_the_names_are_the_frozen_ones(package: ModuleType) -> None:
    names = list(getattr(package, "__all__", ()))
    assert len(names) == len(set(names)) <= 12
    assert set(names) == FROZEN[package.__name__]


def test_nothing_else_looks_public(package: ModuleType) -> None:
    visible = {
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and not inspect.ismodule(value) and value is not importlib
    }
    assert visible <= FROZEN[package.__name__]


def test_every_name_is_here_and_says_what_it_is(package: ModuleType) -> None:
    for name in FROZEN[package.__name__]:
        named = getattr(package, name)
        assert named.__module__.partition(".")[0] == package.__name__, f"{name} belongs to {named.__module__}"
        assert (named.__doc__ or "").strip(), f"{package.__name__}.{name} has no docstring"


def test_errors_are_store_errors() -> None:
    offload = importlib.import_module("offload")
    for name in FROZEN["offload"]:
        if name.endswith("Error"):
            assert issubclass(getattr(offload, name), offload.StoreError)
