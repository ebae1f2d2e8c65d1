"""Which bytes each rank says it holds, and how many: a table of digests a rank, in memory that all of a host
read.

A digest stands at a place of its own making and may be overwritten by another, or be left from an earlier
step. Either only means that less is shared, or that bytes are published for nobody: what is adopted is
hashed.
"""

import contextlib
import mmap
import os
import secrets
import weakref
from pathlib import Path

_NUM_SLOTS = 1 << 14
_DIGEST_BYTES = 16
_FILE = "announced-"
_HELD_AT = _NUM_SLOTS * _DIGEST_BYTES
_FILE_BYTES = _HELD_AT + 8


class Announced:
    """This rank's table, written here alone, and those of the others in `folder`."""

    def __init__(self, folder: Path, *, rank: int) -> None:
        self._folder = folder
        self._own_prefix = f"{_FILE}{rank}."
        path = folder / f"{self._own_prefix}{secrets.token_hex(4)}"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(file, 0, _FILE_BYTES)
            self._own = mmap.mmap(file, _FILE_BYTES)
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(file)
        self._others: dict[str, mmap.mmap] = {}
        self._end = weakref.finalize(self, _remove, path, os.getpid())

    def find_others(self) -> None:
        """Look for the tables of ranks that came since the last look, and drop those that went."""
        files = [entry for entry in self._files() if entry.name.startswith(_FILE)]
        if files:  # with its own: the folder is still there
            names = {entry.name for entry in files}
            self._others = {name: table for name, table in self._others.items() if name in names}
        for entry in files:
            if entry.name in self._others or entry.name.startswith(self._own_prefix):
                continue
            with contextlib.suppress(OSError, ValueError):  # it is just being made, or gone
                file = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    table = mmap.mmap(file, _FILE_BYTES, prot=mmap.PROT_READ)
                finally:
                    os.close(file)
                self._others[entry.name] = table

    def _files(self) -> list["os.DirEntry[str]"]:
        try:
            return list(os.scandir(self._folder))
        except OSError:  # somebody removed the folder: nothing new comes, what is mapped stays
            return []

    def put(self, digest: bytes) -> None:
        """Announce bytes with this digest."""
        place = _place(digest)
        self._own[place : place + _DIGEST_BYTES] = digest

    def sum_held(self, held_bytes: int) -> int:
        """Tell what this rank holds, and return the sum over all tables, each as it was last told."""
        self._own[_HELD_AT:] = held_bytes.to_bytes(8, "little")
        return held_bytes + sum(int.from_bytes(table[_HELD_AT:], "little") for table in self._others.values())

    def num_others(self, digest: bytes) -> int:
        """Return how many of the others announced this digest."""
        place = _place(digest)
        # By rank: a rank has a table for each of its stores.
        ranks = {
            name.partition(".")[0]
            for name, table in self._others.items()
            if table[place : place + _DIGEST_BYTES] == digest
        }
        return len(ranks)


def _place(digest: bytes) -> int:
    return int.from_bytes(digest[:4], "little") % _NUM_SLOTS * _DIGEST_BYTES


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:
        with contextlib.suppress(OSError):
            path.unlink()
