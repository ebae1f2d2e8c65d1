"""An output directory is refused when something lies in it, and filled whole or not at all."""

from pathlib import Path

import pytest

from integrations.directory import disk_bytes, filled_whole, made_early, require_vacant
from integrations.errors import CommandError


def test_new_and_empty_directories_are_vacant(tmp_path: Path) -> None:
    require_vacant(tmp_path)
    require_vacant(tmp_path / "new")


def test_occupied_ones_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CommandError, match="is not empty: name another --output"):
        require_vacant(tmp_path)
    with pytest.raises(CommandError, match="is a file, not a directory"):
        require_vacant(tmp_path / "file")


def test_files_come_together_and_the_mark_last(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    with filled_whole(directory) as partial:
        for name in ("config.json", "weights", "tokenizer.json"):
            (partial / name).write_text(name)
        assert [path.name for path in directory.iterdir()] == [".partial"]
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "tokenizer.json", "weights"]


def fill_the_disk(path: Path) -> None:
    path.write_text("half")
    raise OSError(28, "No space left on device")


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "new"
    with (
        pytest.raises(CommandError, match=r"cannot write .*new: .*No space left"),
        filled_whole(directory) as partial,
    ):
        fill_the_disk(partial / "weights")
    assert not directory.exists()


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(KeyboardInterrupt), filled_whole(tmp_path):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_directory_made_early_goes_when_unused(tmp_path: Path) -> None:
    with made_early(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()
    with made_early(tmp_path / "new"):
        (tmp_path / "new" / "x").write_text("x")
    assert (tmp_path / "new" / "x").exists()


def test_a_place_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(CommandError, match=r"cannot make .*: Not a directory"),
        made_early(tmp_path / "file" / "new"),
    ):
        pass


def test_only_weight_files_count(tmp_path: Path) -> None:
    for name, size in (
        ("a.safetensors", 10),
        ("b.safetensors", 5),
        ("config.json", 99),
        ("tokenizer.json", 7),
    ):
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "c.safetensors").write_bytes(bytes(50))
    assert disk_bytes(tmp_path) == 15
