"""The folder of a job: held by its living, removed by its last, or by the next job."""

import subprocess
import sys
from pathlib import Path

import pytest

from offload.sharding.folder import Folder, remove_abandoned

HOLDER = """
import sys, time
from pathlib import Path
from offload.sharding.folder import Folder
folder = Folder(Path(sys.argv[1]), "job")
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
    first, second = Folder(tmp_path, "job"), Folder(tmp_path, "job")
    (first.path / "bytes").touch()
    first.leave()
    assert second.path.is_dir()
    second.leave()
    assert not second.path.exists()
    second.leave()


def test_the_living_keep_it_and_the_killed_do_not(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    other = Folder(tmp_path, "another-job")
    remove_abandoned(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"offload-job", "offload-another-job"}
    holder.kill()
    holder.wait()
    remove_abandoned(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"offload-another-job"}
    other.leave()


def test_only_the_owner_may_look_inside(tmp_path: Path) -> None:
    folder = Folder(tmp_path, "job")
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert (folder.path / "lock").stat().st_mode & 0o777 == 0o600
    folder.leave()


def test_a_folder_that_is_just_being_made_stays(tmp_path: Path) -> None:
    (tmp_path / "offload-new").mkdir()
    (tmp_path / "other").mkdir()
    remove_abandoned(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
