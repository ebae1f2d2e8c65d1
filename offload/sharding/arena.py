"""Files in memory named by the hash of their bytes: published, adopted, and written anew step after step.

New pages cost several times what a copy into old ones does, so a rank keeps what it published for the next
publish of that size. Who maps a file holds a lock on it that ends with the mapping: a file that anybody still
reads, or has handed to autograd, is not written again.
"""

import contextlib
import fcntl
import os
import secrets
import weakref
from collections import deque
from pathlib import Path

from torch import Tensor

from offload.digest import digest_of_bytes, view_of
from offload.sharding.folder import Folder
from offload.sharding.mapping import Mapping, map_private, tensor_on

_NUM_TRIED = 2


class Published:
    """A file of this rank, under its name until it is written anew. Its end makes that possible, and comes
    before the end of its arena, which removes the file.
    """

    __slots__ = ("_arena", "_path", "_size")

    def __init__(self, path: Path, *, size: int, arena: "Arena") -> None:
        self._path = path
        self._size = size
        self._arena = arena

    def __del__(self) -> None:
        self._arena.ended.append((self._size, self._path))


class Arena:
    """This rank's files in the folder of its job. The folder's end removes them.

    Args:
        folder: of the job, on a file system in memory. Joined for as long as the arena lives.
    """

    def __init__(self, folder: Folder) -> None:
        self._joined = folder  # left when nothing in it is in use
        self._folder = folder.path
        self.ended: deque[tuple[int, Path]] = deque()
        """Files that nobody of this rank holds any more, with their sizes."""
        self._free: dict[int, list[Path]] = {}
        self._unused: set[Path] = set()
        weakref.finalize(self, _remove, self.ended, self._free, owner=folder.owner)

    def begin_step(self) -> None:
        """Remove what was free during all of the last step."""
        self._collect()
        for paths in self._free.values():
            for path in self._unused.intersection(paths):
                paths.remove(path)
                with contextlib.suppress(OSError):
                    path.unlink()
        self._unused = {path for paths in self._free.values() for path in paths}

    def adopt(self, digest: bytes, num_bytes: int) -> tuple[Mapping, Mapping] | None:
        """Return two mappings of the published file with these bytes, the first one read; None if there is
        none.
        """
        try:
            file = os.open(self._named(digest), os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # fails while its owner writes it anew
            if os.fstat(file).st_size != num_bytes:
                return None
            return _checked(file, digest, num_bytes=num_bytes)
        except OSError:
            return None
        finally:
            os.close(file)

    def publish(self, digest: bytes, flat: Tensor) -> "tuple[Mapping, Mapping, Published] | None":
        """Write `flat`, uint8 `[n]`, to a file that then gets its name, and return two mappings of it, the
        first one read; None where another rank is at it, or there is no room.
        """
        elected = self._folder / f"{digest.hex()}.part"
        try:
            os.close(os.open(elected, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except OSError:
            return None
        try:
            return self._write(digest, flat)
        except OSError:
            return None
        finally:
            with contextlib.suppress(OSError):
                elected.unlink()

    def _write(self, digest: bytes, flat: Tensor) -> "tuple[Mapping, Mapping, Published] | None":
        path, file = self._file(flat.numel())
        try:
            _write_all(file, view_of(flat))
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            mappings = _checked(file, digest, num_bytes=flat.numel())
            if mappings is None:
                return None
            self._named(digest).hardlink_to(path)  # fails where another rank was quicker
            return *mappings, Published(self._named(digest), size=flat.numel(), arena=self)
        finally:
            os.close(file)
            with contextlib.suppress(OSError):
                path.unlink()

    def _file(self, num_bytes: int) -> tuple[Path, int]:
        """Return a file of this size without a name that others know, locked: an old one that nobody maps, or
        a new one.
        """
        self._collect()
        free = self._free.get(num_bytes, [])
        for old in free[:_NUM_TRIED]:
            path = self._folder / f"{secrets.token_hex(8)}.own"
            try:
                file = os.open(old, os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                free.remove(old)
                continue
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                old.rename(path)
            except OSError:  # somebody maps it still
                os.close(file)
                continue
            free.remove(old)
            return path, file
        return self._new_file(num_bytes)

    def _new_file(self, num_bytes: int) -> tuple[Path, int]:
        path = self._folder / f"{secrets.token_hex(8)}.own"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(file, 0, num_bytes)  # what finds no room fails here, and not as it is written
        except OSError:
            os.close(file)
            path.unlink()
            raise
        return path, file

    def _collect(self) -> None:
        while self.ended:
            size, path = self.ended.popleft()
            self._free.setdefault(size, []).append(path)

    def _named(self, digest: bytes) -> Path:
        return self._folder / digest.hex()


def _remove(ended: "deque[tuple[int, Path]]", free: dict[int, list[Path]], *, owner: int) -> None:
    if os.getpid() == owner:  # a forked child leaves the files alone
        for path in [path for _, path in ended] + [path for paths in free.values() for path in paths]:
            with contextlib.suppress(OSError):
                path.unlink()


def _checked(file: int, digest: bytes, *, num_bytes: int) -> tuple[Mapping, Mapping] | None:
    read = map_private(file, num_bytes)
    return (read, map_private(file, num_bytes)) if digest_of_bytes(tensor_on(read)) == digest else None


def _write_all(file: int, view: memoryview) -> None:
    num_written = 0
    while num_written < len(view):
        num_written += os.pwrite(file, view[num_written:], num_written)
