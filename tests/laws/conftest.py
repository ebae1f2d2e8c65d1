"""Runs a test once for each way to set a store up."""

import pytest
import torch

from offload import SavedTensorStore, pending
from tests.laws.settings import STORES


@pytest.fixture(params=sorted(STORES))
def store(request: pytest.FixtureRequest) -> SavedTensorStore:
    """Return a fresh store, set up in one of the ways."""
    return STORES[request.param]()


@pytest.fixture(autouse=True)
def _batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settle one by one or in batches, by the test's own seed: the laws hold for both."""
    if torch.rand(()) < 0.7:
        monkeypatch.setattr(pending, "BATCH_BYTES", -1)
