"""Runs a test once for each way to set a store up."""

import pytest

from offload import SavedTensorStore
from tests.laws.settings import STORES


@pytest.fixture(params=sorted(STORES))
def store(request: pytest.FixtureRequest) -> SavedTensorStore:
    """Return a fresh store, set up in one of the ways."""
    return STORES[request.param]()
