"""Ranks of one host hold equal bytes once, in files in memory named by their content.

Nothing here waits, and no rank depends on another: who finds bytes that another rank announced publishes
them, or adopts what is published already. A published file is written before it gets its name, and whoever
adopts it hashes it first. A rank that dies, leaves early or sees other data only means that less is shared.
"""

import contextlib
import os
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from offload.digest import digest_of_bytes
from offload.errors import RankMismatchError, StoreError
from offload.part import Lease
from offload.sharding.announced import Announced
from offload.sharding.base import Sharding
from offload.sharding.folder import Folder, remove_abandoned

_MIN_BYTES = 4096
_DIRECTORY = "/dev/shm"


class SharedMemory(Sharding):
    """Sharing through files in memory, among the ranks of a process group that live on one host.

    Args:
        group: whose ranks share, all ranks where None. With a device mesh, `mesh.get_group("name")`.
        directory: a file system in memory. When it is full, bytes stay with their rank.

    A rank counts as held an equal share of shared bytes, by the ranks that announced them so far. The folder
    is joined at the first outermost enter of a store; no collective is issued, then or later. Tensors on
    other devices than the CPU stay where they are.
    """

    def __init__(
        self, *, group: "dist.ProcessGroup | None" = None, directory: str | Path = _DIRECTORY
    ) -> None:
        self._group = group
        self._directory = Path(directory)
        self._joined: dist.ProcessGroup | None = None
        self._folder: Folder | None = None
        self._announced: Announced | None = None

    @property
    def is_joined(self) -> bool:
        """Whether this rank is in the folder."""
        return self._folder is not None

    def look(self) -> None:
        """Join the ranks of this host at the first call, then look who came since."""
        if not dist.is_available() or not dist.is_initialized():
            return
        group = self._group or dist.group.WORLD
        if group is None or dist.get_world_size(group) < 2:
            return
        if group is not self._joined:
            self._join(group)
        if self._announced is not None:
            self._announced.find_others()

    def announce(self, digest: bytes) -> None:
        """Tell the ranks of this host."""
        if self._announced is not None:
            self._announced.put(digest)

    def num_holders(self, digest: bytes) -> int:
        """Return the ranks of this host that announced these bytes, this one included."""
        return 1 if self._announced is None else 1 + self._announced.num_others(digest)

    def place(self, flat: Tensor, *, num_holders: int) -> tuple[Tensor, Lease] | None:
        """Adopt what another rank published, or publish `flat`; None while another rank is at it, where there
        is no room, and for bytes that are few or not on the CPU.
        """
        if self._folder is None or flat.device.type != "cpu" or flat.numel() < _MIN_BYTES:
            return None
        digest = digest_of_bytes(flat)
        path = self._folder.path / digest.hex()
        shared = _adopt(path, digest, flat.numel())
        published = shared is None
        if shared is None:
            shared = _publish(path, digest, flat)
        if shared is None:
            return None
        return shared, _FileLease(
            digest, path=path if published else None, num_holders=num_holders, folder=self._folder
        )

    def _join(self, group: "dist.ProcessGroup") -> None:
        if not self._directory.is_dir():
            raise StoreError(
                f"sharing saved tensors through memory needs the folder {self._directory}, which is not "
                "there; mount a tmpfs, or give SharedMemory(directory=...)"
            )
        self._joined, self._folder, self._announced = group, None, None
        # No room, or a store that cannot compare and set: this rank stays for itself.
        with contextlib.suppress(OSError, RuntimeError, AttributeError):
            remove_abandoned(self._directory)
            folder = Folder(self._directory, _job_name(group, self._directory))
            self._announced = Announced(folder.path, rank=dist.get_rank())
            self._folder = folder


class _FileLease(Lease):
    """A hold of a file's bytes. The publisher's end takes the name away; the bytes live as long as a rank
    maps them.
    """

    __slots__ = ("_folder", "_path")

    def __init__(self, digest: bytes, *, path: Path | None, num_holders: int, folder: Folder) -> None:
        super().__init__(digest, num_holders=num_holders)
        self._path = path
        self._folder = folder  # kept while anything in it is held

    def check(self, shared: Tensor) -> None:
        """Raise RankMismatchError if the bytes are not those that were agreed."""
        found = digest_of_bytes(shared)
        if found != self.digest:
            raise RankMismatchError(
                f"backward needs {shared.numel()} bytes that this rank shares with others of its host, but "
                f"they have digest {found.hex()} now and had {self.digest.hex()} when they were agreed: "
                "another process wrote to them. Run the step again; if it comes back, use shard=False and "
                "report it."
            )

    def __del__(self) -> None:
        if self._path is not None and os.getpid() == self._folder.owner:
            with contextlib.suppress(OSError):
                self._path.unlink()


def _job_name(group: "dist.ProcessGroup", directory: Path) -> str:
    """Return a name that is the same on all ranks of `group` on this host, and on no other job's.

    The first rank to ask sets it in the store that the job's ranks met through; nobody waits for anybody.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    host = boot.read_text().strip() if boot.exists() else os.uname().nodename
    key = f"{host}/{directory.stat().st_dev}/{dist.get_process_group_ranks(group)}".encode()
    store = dist.distributed_c10d._get_default_store()
    name: bytes = store.compare_set(f"offload/{xxhash.xxh3_128_hexdigest(key)}", "", os.urandom(12).hex())
    return name.decode()


def _adopt(path: Path, digest: bytes, num_bytes: int) -> Tensor | None:
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if os.fstat(file).st_size != num_bytes:
            return None
        shared = _mapped(file, num_bytes)
        return shared if digest_of_bytes(shared) == digest else None
    except (OSError, RuntimeError):  # no more files or mappings for this process
        return None
    finally:
        os.close(file)


def _publish(path: Path, digest: bytes, flat: Tensor) -> Tensor | None:
    """Return `flat`'s bytes in a file that gets the name `path` once they are in it; None where another rank
    is the publisher, or the file system has no room.
    """
    part = path.with_suffix(".part")
    try:
        file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        os.posix_fallocate(file, 0, flat.numel())  # a write past the room there is would be SIGBUS
        shared = _mapped(file, flat.numel()).copy_(flat)
        if digest_of_bytes(shared) != digest:
            return None
        path.hardlink_to(part)  # fails where another rank was quicker
        return shared
    except (OSError, RuntimeError):
        return None
    finally:
        os.close(file)
        with contextlib.suppress(OSError):
            part.unlink()


def _mapped(file: int, num_bytes: int) -> Tensor:
    # By the open file, since a name may go at any time; the mapping outlives both.
    return torch.from_file(f"/proc/self/fd/{file}", shared=True, size=num_bytes, dtype=torch.uint8)
