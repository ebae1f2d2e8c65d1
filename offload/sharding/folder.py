"""The folder in which the ranks of one job and host meet: who lives holds its lock, who dies loses it.

The kernel drops a lock with the process that held it, however it ended, so that no process number is ever
asked about: a folder of which nobody holds the lock is left over, and the next job removes it.
"""

import contextlib
import fcntl
import os
import re
import time
import weakref
from pathlib import Path

from offload.errors import StoreError

_PREFIX = "offload-"
_LOCK = "lock"
_NAME = re.compile(_PREFIX + "[0-9a-f]{24}")
_NUM_TRIED = 100
_PAUSE_SECONDS = 0.01


class Folder:
    """A job's folder, joined. Owns a share of its lock; the last one out removes it."""

    def __init__(self, parent: Path, name: str) -> None:
        self.path = parent / f"{_PREFIX}{name}"
        self.owner = os.getpid()
        """The process that joined; a forked child leaves the files alone."""
        lock = _join(self.path)
        self._leave = weakref.finalize(self, _leave, self.path, lock, self.owner)

    def leave(self) -> None:
        """Give up the lock; also done at the object's end and at the interpreter's."""
        self._leave()


def remove_abandoned(parent: Path) -> None:
    """Remove the folders of jobs of this user that no living process holds."""
    for path in parent.iterdir():
        if _NAME.fullmatch(path.name):
            with contextlib.suppress(OSError):
                if path.lstat().st_uid == os.getuid():
                    _remove_if_free(path)


def _join(path: Path) -> int:
    """Make `path` where it is missing, and return its lock, held. Who removes it has the lock for an instant,
    or for as long as it is stopped.
    """
    for _ in range(_NUM_TRIED):
        with contextlib.suppress(FileNotFoundError):  # somebody removed it between two of these lines
            path.mkdir(mode=0o700, exist_ok=True)
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if _is_shared(lock) and _is_named(lock, path / _LOCK):
                return lock
            os.close(lock)
        time.sleep(_PAUSE_SECONDS)
    raise StoreError(
        f"joining the ranks of this host failed: {path} is removed as soon as it is made, or another process "
        f"has locked it for longer than {_NUM_TRIED * _PAUSE_SECONDS:g} s"
    )


def _is_shared(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_named(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False


def _leave(path: Path, lock: int, owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked child has the same lock: it is its parent's to give up
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_UN)  # closing does not: a forked child has the same lock
        os.close(lock)
    with contextlib.suppress(OSError):
        _remove_if_free(path)


def _remove_if_free(path: Path) -> None:
    try:
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        path.rmdir()  # of a job that died between making it and its lock
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for file in path.iterdir():
            if file.name != _LOCK:
                file.unlink()
        (path / _LOCK).unlink()  # last: without it, a folder that is not empty is nobody's to remove
        path.rmdir()
    except BlockingIOError:
        pass  # in use
    finally:
        os.close(lock)
