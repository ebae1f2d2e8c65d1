"""A checkpoint is complete or not there, the last one is marked, and other settings do not resume."""

import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch

from integrations.checkpoint import Checkpoints
from integrations.errors import CommandError
from integrations.ranks import Ranks

STATE = {"numbers": {"a": [1, 2.5, "x"]}, "tensor": torch.arange(3), "step": torch.tensor(4.0)}
FILE = "shard-00001-model-00001-of-00001.safetensors"


def checkpoints(directory: Path, *, num_kept: int = 2, **settings: object) -> Checkpoints:
    return Checkpoints(directory, settings=settings or {"bits": 3}, num_kept=num_kept, ranks=Ranks())


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    state = {
        "numbers": {"a": [1, 2.5, "x"]},
        "count": torch.tensor(2**40 + 1),
        "weight": torch.randn(3, 5).bfloat16(),
        "empty": torch.zeros(0, 4),
    }
    checkpoints(tmp_path).save(state, step=7)
    found = {
        name: torch.zeros_like(value) if isinstance(value, torch.Tensor) else None
        for name, value in state.items()
    }
    assert checkpoints(tmp_path).load(found) == {"numbers": state["numbers"]}
    for name in ("count", "weight", "empty"):
        assert torch.equal(found[name], state[name])


def test_nothing_is_loaded_where_nothing_is(tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "none").load({}) is None


def draws() -> list[float]:
    return [float(torch.rand(())), random.random(), float(numpy.random.rand()), float(numpy.random.randn())]


def test_random_states_go_on_where_they_were(tmp_path: Path) -> None:
    draws()
    checkpoints(tmp_path).save(STATE, step=1)
    expected = draws()
    draws()
    checkpoints(tmp_path).load(STATE)
    assert draws() == expected


def test_the_latest_stay_and_the_last_is_marked(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        checkpoints(tmp_path, num_kept=2).save({"step": step}, step=step)
    assert names(tmp_path) == ["last.json", "step-00000015", "step-00000020"]
    assert json.loads((tmp_path / "last.json").read_text()) == {"checkpoint": "step-00000020"}
    assert checkpoints(tmp_path).load({}) == {"step": 20}


def test_one_that_was_cut_short_does_not_count(tmp_path: Path) -> None:
    """As SIGKILL leaves it while writing: the earlier one is loaded, and the next takes the rest away."""
    checkpoints(tmp_path).save({"step": 5}, step=5)
    partial = tmp_path / ".partial-step-00000010"
    partial.mkdir()
    (partial / FILE).write_bytes(b"half of it")
    assert checkpoints(tmp_path).load({}) == {"step": 5}
    checkpoints(tmp_path).save({"step": 11}, step=11)
    assert names(tmp_path) == ["last.json", "step-00000005", "step-00000011"]


def test_a_step_saved_twice_is_one_checkpoint(tmp_path: Path) -> None:
    for _ in range(2):
        checkpoints(tmp_path).save(STATE, step=5)
    assert names(tmp_path) == ["last.json", "step-00000005"]


def test_another_setting_is_named(tmp_path: Path) -> None:
    checkpoints(tmp_path, bits=3, seed=0).save(STATE, step=1)
    with pytest.raises(
        CommandError, match="it was made with bits 3, now bits is 4: give the same, or another"
    ):
        checkpoints(tmp_path, bits=4, seed=0).load(STATE)


@pytest.mark.parametrize("name", [FILE, "settings.json", "state.json"])
@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"", None])
def test_a_damaged_checkpoint_is_told(name: str, damage: object, tmp_path: Path) -> None:
    path = checkpoints(tmp_path).save(STATE, step=1) / name
    if callable(damage):
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    with pytest.raises(CommandError, match=r"the last checkpoint in .* cannot be read"):
        checkpoints(tmp_path).load(STATE)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(
            (name, content)
            for name in ("last.json", "settings.json", "state.json")
            for content in ("[]", "3")
        ),
        ("last.json", '{"checkpoint": 3}'),
        ("state.json", '{"shapes": 3, "rest": {"a": 1}, "random": [1]}'),
        ("state.json", '{"shapes": {"a": "b"}, "rest": [], "random": [1]}'),
        ("state.json", '{"shapes": {"a": "b"}, "rest": {"a": 1}, "random": []}'),
    ],
)
def test_an_edited_checkpoint_is_told(name: str, content: str, tmp_path: Path) -> None:
    last = checkpoints(tmp_path).save(STATE, step=1)
    (tmp_path if name == "last.json" else last).joinpath(name).write_text(content)
    with pytest.raises(
        CommandError, match=rf"the last checkpoint in .* cannot be read \({name} was edited: "
    ):
        checkpoints(tmp_path).load(STATE)


def test_a_mark_without_its_checkpoint_is_told(tmp_path: Path) -> None:
    (tmp_path / "last.json").write_text('{"checkpoint": "step-00000009"}')
    with pytest.raises(CommandError, match="cannot be read"):
        checkpoints(tmp_path).load(STATE)


def test_a_second_signal_while_writing_is_no_failed_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoints(tmp_path).save(STATE, step=1)
    assert checkpoints(tmp_path).load(STATE) is None


def test_a_checkpoint_of_an_earlier_version_is_told(tmp_path: Path) -> None:
    path = checkpoints(tmp_path).save(STATE, step=1)
    (path / "state.json").rename(path / "state.pt")
    with pytest.raises(
        CommandError, match=r"cannot be read \(.*No such file .*state.json'\): name an older one"
    ):
        checkpoints(tmp_path).load(STATE)


@pytest.mark.parametrize("tensor", [torch.zeros(4, 3), torch.zeros(3, 4).double(), None])
def test_another_model_is_told(tensor: torch.Tensor | None, tmp_path: Path) -> None:
    checkpoints(tmp_path).save({"kept": torch.ones(2), "weight": torch.ones(3, 4)}, step=1)
    now = {"kept": torch.zeros(2)} | ({} if tensor is None else {"weight": tensor})
    with pytest.raises(CommandError, match=r"does not fit .*: weight was torch.float32 \[3, 4\], now it is "):
        checkpoints(tmp_path).load(now)
    assert not now["kept"].any()


def test_no_pickle_is_written(tmp_path: Path) -> None:
    path = checkpoints(tmp_path).save(STATE, step=1)
    assert names(path) == ["settings.json", FILE, "state.json"]


def test_a_large_state_is_written_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes into one is copied in memory before."""
    monkeypatch.setattr("integrations.tensor_files._FILE_BYTES", 1000)
    state = {f"weight {index}": torch.full((100,), float(index)) for index in range(6)}
    path = checkpoints(tmp_path).save(state, step=1)
    assert len(list(path.glob("*.safetensors"))) == 3
    found = {name: torch.zeros_like(value) for name, value in state.items()}
    assert checkpoints(tmp_path).load(found) == {}
    assert all(torch.equal(found[name], value) for name, value in state.items())
    (path / "shard-00001-model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CommandError, match=r"of the 100 values of weight \d there are 0"):
        checkpoints(tmp_path).load(found)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, where mounting one is permitted."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small file system is not permitted here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_leaves_the_earlier_checkpoint(small_disk: Path) -> None:
    checkpoints(small_disk).save({"step": 1}, step=1)
    with pytest.raises(CommandError, match=r"cannot write the checkpoint of step 2: .*MiB are free under"):
        checkpoints(small_disk).save({"tensor": torch.randn(100_000)}, step=2)
    assert names(small_disk) == ["last.json", "step-00000001"]
    assert checkpoints(small_disk).load({}) == {"step": 1}


def test_a_failing_file_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints(tmp_path).save({"step": 1}, step=1)

    def fail(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    for directory in (tmp_path, tmp_path / "new"):
        with pytest.raises(
            CommandError, match=r"cannot write the checkpoint of step 2: .*No space left on device"
        ):
            checkpoints(directory).save({"step": 2}, step=2)
    assert names(tmp_path) == ["last.json", "step-00000001"]
