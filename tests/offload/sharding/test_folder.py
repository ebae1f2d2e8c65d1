"""The folder of a job: held by its living, removed by its last, or by the next job."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from offload import StoreError
from offload.sharding import folder as folder_module
from offload.sharding.folder import Folder, remove_abandoned

NAME, OTHER = "a" * 24, "b" * 24
HOLDER = """
import sys, time
from pathlib import Path
from offload.sharding.folder import Folder
folder = Folder(Path(sys.argv[1]), "a" * 24)
print("joined", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "joined\n"
    yield process
    process.kill()
    process.communicate()


def test_the_last_one_out_removes_it(tmp_path: Path) -> None:
    first, second = Folder(tmp_path, NAME), Folder(tmp_path, NAME)
    (first.path / "bytes").touch()
    first.leave()
    assert second.path.is_dir()
    second.leave()
    assert not second.path.exists()
    second.leave()


def test_the_living_keep_it_and_the_killed_do_not(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    other = Folder(tmp_path, OTHER)
    remove_abandoned(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"offload-{NAME}", f"offload-{OTHER}"}
    holder.kill()
    holder.wait()
    remove_abandoned(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"offload-{OTHER}"}
    other.leave()


def test_one_that_is_locked_by_a_process_that_stopped_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "_PAUSE_SECONDS", 0.0)
    first = Folder(tmp_path, NAME)
    first.leave()
    first.path.mkdir()
    with (first.path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="another process has locked it for longer than"):
            Folder(tmp_path, NAME)


def test_only_the_owner_may_look_inside(tmp_path: Path) -> None:
    folder = Folder(tmp_path, NAME)
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert (folder.path / "lock").stat().st_mode & 0o777 == 0o600
    folder.leave()


def test_what_is_somebody_elses_stays(tmp_path: Path) -> None:
    (tmp_path / "offload-my-weights").mkdir()
    (tmp_path / "offload-my-weights" / "weights.bin").touch()
    (tmp_path / f"offload-{OTHER}").mkdir()
    (tmp_path / f"offload-{OTHER}" / "weights.bin").touch()
    remove_abandoned(tmp_path)
    assert len(list(tmp_path.glob("*/weights.bin"))) == 2


def test_a_forked_child_does_not_keep_it(tmp_path: Path) -> None:
    folder = Folder(tmp_path, NAME)
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
    try:
        folder.leave()
        assert not folder.path.exists()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
