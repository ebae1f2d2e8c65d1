"""The benchmark of one decoder layer, at a small size."""

import json
import sys
from pathlib import Path

import pytest

from bench.scale import __main__ as command
from bench.scale import layer7b, room
from bench.scale.shape import LLAMA_7B, Shape

SMALL = Shape(width=64, mlp_width=160, num_layers=2, num_heads=4, num_key_heads=2, vocabulary=96)


def test_the_7b_shape_has_as_many_weights_as_llama_7b() -> None:
    assert LLAMA_7B.num_weights == 6_738_415_616
    assert sum(weight.numel() for weight in SMALL.model().parameters()) == SMALL.num_weights
    assert all(weight.element_size() == 2 for weight in SMALL.model().parameters())


def test_every_figure_is_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = layer7b.measure(SMALL, num_tokens=16, num_rounds=1)
    for way in ("dense", "edkm"):
        assert result[way]["peak_bytes"] > result[way]["held_bytes"] > 0
        assert len(result[way]["step_seconds"]) == 1
    # What each linear runs on, in bf16, and little else.
    grown = result["edkm"]["held_bytes"] - result["dense"]["held_bytes"]
    assert 0 < grown <= 2 * result["num_clustered"] + 7 * 2000
    assert result["plain_dkm"]["kept_bytes"] > 100 * result["num_clustered"]
    monkeypatch.setattr(layer7b, "measure", lambda: dict(result))
    monkeypatch.setattr(sys, "argv", ["bench.scale", "layer7b", "--json"])
    command.main()
    assert json.loads(capsys.readouterr().out)["limit_seconds"] == result["limit_seconds"]
    monkeypatch.setattr(sys, "argv", ["bench.scale", "layer7b"])
    command.main()
    assert "plain DKM" in capsys.readouterr().out


def test_what_does_not_fit_is_refused_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer7b, "run_child", lambda *_, **__: pytest.fail("it started"))
    huge = Shape(width=1 << 20, mlp_width=1 << 20, num_layers=1, num_heads=1, num_key_heads=1)
    with pytest.raises(SystemExit, match=r"layer7b needs about .* GiB of memory, .* are free: end what"):
        layer7b.measure(huge)
    with pytest.raises(SystemExit, match=r"x needs about .* GiB on disk, .* are free in /: name another"):
        room.require_disk(1 << 60, folder=Path("/"), what="x")
