"""A really trained LLaMA: packed, refused by save_pretrained, saved and loaded to the same logits."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from edkm import DKMConfig, PaletteError, cluster, load_palettized, palettize, save_palettized


def test_stories260k(shared_data: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    directory = shared_data / "models" / "stories260K-hf"
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    batch = torch.randint(0, 512, (2, 32))
    cluster(model, DKMConfig(bits=3, embedding_bits=8))
    with torch.no_grad():
        expected = model(input_ids=batch).logits
    for changed in (model, palettize(model)):
        with pytest.raises(PaletteError, match="save_pretrained of a clustered LlamaForCausalLM"):
            changed.save_pretrained(tmp_path / "dense")
        with pytest.raises(PaletteError, match="save_pretrained of a clustered LlamaModel"):
            changed.model.save_pretrained(tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    save_palettized(model, tmp_path / "packed")
    fresh = transformers.AutoModelForCausalLM.from_config(model.config).eval()
    loaded = load_palettized(tmp_path / "packed", into=fresh)
    with torch.no_grad():
        assert torch.equal(model(input_ids=batch).logits, expected)
        assert torch.equal(loaded(input_ids=batch).logits, expected)
    path = tmp_path / "packed" / "palettized.safetensors"
    with safe_open(path, framework="pt") as opened:
        tensors = [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118 - it is no dict
    assert path.stat().st_size <= 1.01 * sum(t.nbytes for t in tensors) + 160 * len(tensors)
