"""The comparison of what 3 bits cost tells what it says it tells, on a model that is nothing."""

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import quality, quality_rivals
from bench.rival import MISSING
from integrations.demo import write_untrained
from integrations.recipe import Recipe

SENTENCE = "The quick brown fox jumps over the lazy dog, then sleeps. "


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Return the options that name a tiny model and its text."""
    write_untrained(tmp_path / "model", width=32, num_layers=1, context=32)
    text = tmp_path / "text.txt"
    text.write_text(SENTENCE * 10)
    return ["--model", str(tmp_path / "model"), "--data", str(text), "--text", str(text), "--steps", "2"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.quality", *arguments])
    quality.main()


def test_every_row_is_there(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    run(monkeypatch, *arguments, "--json")
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert tuple(rows) == quality.ROWS
    assert rows["DKMPalettizer"]["left_out"] == MISSING
    dense, control, edkm = (rows[name] for name in ("dense as it came", "dense control", "eDKM"))
    assert dense["bits_per_weight"] == control["bits_per_weight"] == 32
    assert edkm["num_steps"] == control["num_steps"] == 2
    assert rows["straight-through"]["num_steps"] >= 1
    # The same indices and tables, however they were found.
    for name in ("k-means", "sensitivity-weighted k-means", "straight-through"):
        assert rows[name]["bits_per_weight"] == edkm["bits_per_weight"] < 12
    assert rows["round-to-nearest"]["bits_per_weight"] < 12
    assert "perplexity" in quality._table(rows)


def test_a_trained_rival_needs_to_know_for_how_long(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments, "--only", "straight-through")
    assert "give --seconds" in capsys.readouterr().err


def test_rows_of_a_day_are_kept_together(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.machine.RESULTS", tmp_path)
    for row in ("dense as it came", "k-means"):
        run(monkeypatch, *arguments, "--only", row, "--keep")
    (path,) = tmp_path.glob("quality_*.json")
    assert set(json.loads(path.read_text())["rows"]) == {"dense as it came", "k-means"}


def test_the_straight_through_layer_snaps_and_passes_gradients() -> None:
    weight = torch.randn(16, 8, requires_grad=True)
    recipe = Recipe("model", Path("text.txt"), bits=2, num_groups=2)
    snapped = quality_rivals.StraightThrough(weight, recipe=recipe)(weight)
    assert [len(group.unique()) for group in (snapped[:8], snapped[8:], snapped)] == [4, 4, 8]
    assert torch.equal(torch.autograd.grad(snapped.sum(), weight)[0], torch.ones(16, 8))
