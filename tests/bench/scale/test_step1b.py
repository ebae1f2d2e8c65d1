"""The benchmark of a whole step, at a small size."""

import pytest

from bench.scale import step1b
from bench.scale.shape import LLAMA_1B, Shape

SMALL = Shape(width=64, mlp_width=160, num_layers=2, num_heads=4, num_key_heads=2, vocabulary=96)


def test_the_shape_has_over_a_billion_weights() -> None:
    assert LLAMA_1B.num_weights == 1_100_048_384


def test_every_figure_is_there() -> None:
    result = step1b.measure(SMALL, num_tokens=16)
    assert list(result["seconds"]) == ["make", "cluster", "forward", "backward", "update"]
    assert result["losses"][1] < result["losses"][0]
    assert 1 << 27 < result["peak_bytes"] < 1 << 30
    assert result["within_limits"]
    assert result["plain_dkm"]["kept_bytes"] > 100 * result["num_clustered"]
    assert "plain DKM would keep" in step1b.table(result)


def test_what_does_not_fit_is_refused_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step1b, "run_child", lambda *_, **__: pytest.fail("it started"))
    huge = Shape(width=1 << 16, mlp_width=1 << 18, num_layers=99, num_heads=1, num_key_heads=1)
    with pytest.raises(SystemExit, match=r"step1b needs about .* GiB of memory"):
        step1b.measure(huge)
