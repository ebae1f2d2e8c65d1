"""The comparison of what 3 bits cost tells what it says it tells, on a model that is nothing."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from bench import quality, quality_rivals
from bench.rival import MISSING
from integrations.demo import write_untrained
from integrations.recipe import Recipe
from integrations.train import Schedule

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
    for seconds in ("0", "inf"):
        with pytest.raises(SystemExit):
            run(monkeypatch, *arguments, "--only", "straight-through", "--seconds", seconds)
        assert f"'{seconds}' is not a number above 0" in capsys.readouterr().err


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


def test_a_trained_rival_trains_by_the_clock(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count()  # each look at the clock takes one
    monkeypatch.setattr("bench.quality_rivals.time.monotonic", lambda: float(next(seconds)))
    rival = quality_rivals.Rival(Recipe(arguments[1], Path(arguments[3])), seconds=40.0)
    notes = quality_rivals.straight_through(rival).notes
    assert 10 < notes["num_steps"] <= 20  # a step looks for its rate and then whether another one is due
    assert 40 <= notes["training_seconds"] <= 43


def test_rates_by_the_clock_are_those_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = quality_rivals.TimedSchedule(100, 0.01, began=50.0, seconds=200.0)
    for num_done in (0, 3, 50, 99):
        monkeypatch.setattr("time.monotonic", lambda now=50.0 + 2 * num_done: now)
        assert timed.factor(7) == Schedule(100, 0.01).factor(num_done)
    monkeypatch.setattr("time.monotonic", lambda: 260.0)  # past the end
    assert timed.factor(7) == Schedule(100, 0.01).factor(99)
