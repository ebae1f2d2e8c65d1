"""What every test starts from: a seed of its own, and the way to the real inputs."""

import os
import random
import zlib
from pathlib import Path

import numpy
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SEED = int(os.environ.get("EDKM_SEED", "0"))


def pytest_report_header() -> str:
    """Say which inputs this run draws."""
    return f"inputs drawn from EDKM_SEED={SEED} (another number draws others)"


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Give each test inputs that depend on its name alone, not on the tests that ran before it."""
    seed = zlib.crc32(f"{SEED}:{request.node.nodeid}".encode())
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the project's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real models and texts that lies beside the project, or skip."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real inputs in {folder}, which are not part of the project")
    return folder
