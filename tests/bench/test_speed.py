"""The benchmark of the fused layer tells what it says it tells, at a small size."""

import importlib.util
import json
import sys

import pytest
import torch

from bench import rival, speed


def test_every_row_is_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(speed, "measure_palettizer", lambda weight, **_: {"left_out": rival.MISSING})
    monkeypatch.setattr(sys, "argv", ["bench.speed", "--size", "256", "--rounds", "1", "--json"])
    speed.main()
    result = json.loads(capsys.readouterr().out)
    rows = [(row["size"], row["dtype"], row["iterations"]) for row in result["speed"]]
    assert rows == [(256, "torch.bfloat16", 1), (256, "torch.bfloat16", 3), (128, "torch.float32", 3)]
    for row in result["speed"]:
        assert row["fused"]["saved_bytes"] < 1000
        assert row["plain"]["saved_bytes"] > 8 * 4 * row["size"] ** 2
    assert result["DKMPalettizer"]["left_out"] == rival.MISSING
    assert all(row["within_limit"] for row in result["gradient_errors"])
    assert "plain" in speed._table(result)


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed.Problem, "plain_bytes", lambda self: 2**60)
    row = speed.measure(64, dtype=torch.bfloat16, iterations=1, num_rounds=1)
    assert "GiB" in row["plain"]["left_out"]
    assert row["fused"]["step_seconds"]


@pytest.mark.skipif(importlib.util.find_spec("coremltools") is None, reason=rival.MISSING)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own
def test_the_rival() -> None:
    row = rival.measure_palettizer(torch.randn(256, 256) * 0.02, num_rounds=1)
    assert row["saved_bytes"] > 100 * 4 * 256**2 / 4


@pytest.mark.skipif(importlib.util.find_spec("coremltools") is not None, reason="coremltools is installed")
def test_without_the_rival_the_row_says_why() -> None:
    assert rival.measure_palettizer(torch.zeros(2, 2), num_rounds=1) == {"left_out": rival.MISSING}
