"""The benchmark of packing, at a small size."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.scale import pack7b
from bench.scale.shape import LLAMA_7B, Shape

SMALL = Shape(width=256, mlp_width=640, num_layers=2, num_heads=4, num_key_heads=2, vocabulary=512)


def test_the_expected_size_is_that_of_the_bits() -> None:
    assert round(pack7b._expected_bytes(LLAMA_7B) / 2**30, 3) == 2.506


def test_every_figure_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = pack7b.measure(SMALL)
    assert result["load"]["packed_bytes"] < result["directory_bytes"] < 1.1 * result["expected_bytes"]
    assert result["pack"]["peak_bytes"] > 1 << 27
    assert "in bfloat16" in pack7b.table(result)
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_refused_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack7b, "run_child", lambda *_, **__: pytest.fail("it started"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(SystemExit, match=r"pack7b needs about 2\.6 GiB on disk, 0\.0 are free in"):
        pack7b.measure()
