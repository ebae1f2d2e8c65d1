"""The demo compares three models, leaves its files, and never writes over others."""

from pathlib import Path

import pytest

from integrations.demo import demo, fresh_directory, table


def test_a_directory_that_exists_is_left_alone(tmp_path: Path) -> None:
    wanted = tmp_path / "demo"
    made = [fresh_directory(wanted) for _ in range(3)]
    assert [path.name for path in made] == ["demo", "demo-2", "demo-3"]


def test_a_file_of_that_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("x")
    assert fresh_directory(tmp_path / "demo").name == "demo-2"


def test_the_demo_compares_and_leaves_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "demo").mkdir()
    result = demo(tmp_path / "demo", base_steps=2, clustered_steps=1)
    told = capsys.readouterr().err
    assert f"the demo writes to {tmp_path / 'demo-2'}" in told
    assert [f"{part} of 4: " in told for part in range(1, 6)] == [True] * 4 + [False]
    base, packed, clustered = result["rows"].values()
    assert clustered["disk_bytes"] < packed["disk_bytes"] < base["disk_bytes"]
    assert clustered["peak_held_bytes"] < clustered["saved_bytes"]
    plain, fused = result["clustering"].values()
    assert fused["saved_bytes"] * 1000 < plain["saved_bytes"]
    assert fused["peak_held_bytes"] * 100 < plain["peak_held_bytes"]
    assert all(Path(file).is_file() for file in result["files"])
    shown = table(result).splitlines()
    assert shown[0].split() == ["perplexity", "on", "disk", "autograd", "asked", "store", "held"]
    assert len({len(line) for line in shown[:4]}) == 1
    assert [line.split(",")[0] for line in shown[1:4]] == ["base", "k-means", "eDKM"]
    assert [line.split("  ")[0] for line in shown[5:8]] == [
        "clustering alone, a step",
        "plain DKM",
        "the fused step",
    ]
    assert f"  {tmp_path / 'demo-2' / 'edkm' / 'palettized.safetensors'}" in shown
