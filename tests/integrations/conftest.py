"""A model, a tokenizer and a text, each as small as the commands take them."""

from pathlib import Path

import pytest

from integrations.demo import write_untrained
from integrations.transformers import HubTokenizer, load_tokenizer

SENTENCE = "The quick brown fox jumps over the lazy dog, then sleeps. "


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of an untrained byte-level LLaMA with a context of 32."""
    directory = tmp_path_factory.mktemp("tiny-model")
    write_untrained(directory, width=32, num_layers=1, context=32)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> HubTokenizer:
    """Return its tokenizer: one token a byte."""
    return load_tokenizer(str(tiny_model))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Return a plain text of some 40 blocks."""
    path = tmp_path / "text.txt"
    path.write_text(SENTENCE * 20)
    return path
