"""Ranks of one host hold equal bytes once, in files in memory named by their content.

Nothing here waits, and no rank depends on another: who finds bytes that another rank announced publishes
them, or adopts what is published already. A published file is written before it gets its name, and whoever
adopts it hashes it first. A rank that dies, leaves early or sees other data only means that less is shared.
"""

import contextlib
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
import xxhash
from torch import Tensor

from offload.digest import digest_of_bytes
from offload.errors import RankMismatchError, StoreError
from offload.ledger import Ledger
from offload.part import Lease
from offload.sharding.announced import Announced
from offload.sharding.arena import Arena, Published
from offload.sharding.base import Sharding
from offload.sharding.folder import Folder, remove_abandoned
from offload.sharding.group import group_of, host_name, job_store
from offload.sharding.mapping import Mapping, tensor_on

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
        self._arena: Arena | None = None
        self._announced: Announced | None = None

    @property
    def is_joined(self) -> bool:
        """Whether this rank is in the folder."""
        return self._arena is not None

    def begin_step(self, ledger: Ledger) -> None:
        """Join the ranks of this host at the first call."""
        group = group_of(self._group)
        if group is None:
            self._joined = self._arena = self._announced = None
        elif group is not self._joined:
            self._join(group)
        if self._arena is not None:
            self._arena.begin_step()
        self.look()

    def look(self) -> None:
        """See which ranks came since."""
        if self._announced is not None:
            self._announced.find_others()

    def announce(self, digest: bytes) -> None:
        """Tell the ranks of this host."""
        if self._announced is not None:
            self._announced.put(digest)

    def num_holders(self, digest: bytes) -> int:
        """Return the ranks of this host that announced these bytes, this one included."""
        return 1 if self._announced is None else 1 + self._announced.num_others(digest)

    def place(self, flat: Tensor, digest: bytes) -> Lease | None:
        """Adopt what another rank published, or publish `flat`; None while another rank is at it, and where
        there is no room.
        """
        if self._arena is None:
            return None
        adopted = self._arena.adopt(digest, flat.numel())
        if adopted is not None:
            return _FileLease(adopted, digest, arena=self._arena, published=None)
        published = self._arena.publish(digest, flat)
        if published is not None:
            return _FileLease(published[:2], digest, arena=self._arena, published=published[2])
        return None

    def group_held_bytes(self, held_bytes: int) -> int:
        """Return the sum over the ranks of this host, each as it last told."""
        return held_bytes if self._announced is None else self._announced.sum_held(held_bytes)

    def _join(self, group: "dist.ProcessGroup") -> None:
        if not self._directory.is_dir():
            raise StoreError(
                f"sharing saved tensors through memory needs the folder {self._directory}, which is not "
                "there; mount a tmpfs, or give SharedMemory(directory=...)"
            )
        self._joined, self._arena, self._announced = group, None, None
        # No room, or a store that cannot compare and set: this rank stays for itself.
        with contextlib.suppress(OSError, RuntimeError, AttributeError):
            remove_abandoned(self._directory)
            folder = Folder(self._directory, _job_name(group, self._directory))
            self._announced = Announced(folder.path, rank=dist.get_rank())
            self._arena = Arena(folder)


class _FileLease(Lease):
    """A hold of a file's bytes, as two mappings: one is handed out, to one reader after the other as long as
    none writes to it, the other is kept as it is. The bytes live as long as either is mapped by any rank.
    """

    __slots__ = ("_arena", "_digest", "_handed_out", "_kept", "_num_holders", "_published")

    def __init__(
        self, mappings: tuple[Mapping, Mapping], digest: bytes, *, arena: Arena, published: Published | None
    ) -> None:
        # The first was read: its pages are at hand, and finding them is what costs most.
        self._handed_out: list[tuple[Mapping, Callable[[], object]]] = [(mappings[0], _nobody)]
        self._kept = mappings[1]
        self._digest = digest
        self._num_holders = 1
        self._published = published
        self._arena = arena  # kept while anything in it is held

    @property
    def num_bytes(self) -> int:
        """An equal share of the file."""
        return -(-len(self._kept) // self._num_holders)

    @property
    def is_near(self) -> bool:
        """Return True."""
        return True

    def count_holders(self, num_holders: int) -> bool:
        """Count an equal share for so many ranks, once more of them came."""
        if num_holders <= self._num_holders:
            return False
        self._num_holders = num_holders
        return True

    def read(self) -> Tensor:
        """Return the bytes; raises RankMismatchError if they are not those that were agreed."""
        kept = tensor_on(self._kept)
        found = digest_of_bytes(kept)
        if found != self._digest:
            raise RankMismatchError(
                f"its {kept.numel()} bytes in shared memory have digest {found.hex()} now and had "
                f"{self._digest.hex()} when they were agreed: another process wrote to them. Run the step "
                "again; if it comes back, use shard=False and report it."
            )
        return kept

    def read_own(self) -> Tensor:
        """Return a mapping that no other reader has, a new one if need be; a copy where the file has lost its
        name, as it does when the rank that published it is gone, or steps ahead.
        """
        mapping = self._handed_back()
        if mapping is None:
            adopted = self._arena.adopt(self._digest, len(self._kept))
            if adopted is None:
                return self.read().clone()
            mapping = adopted[0]
        own = tensor_on(mapping)
        self._handed_out.append((mapping, weakref.ref(own.untyped_storage())))
        return own

    def _handed_back(self) -> Mapping | None:
        """Return the mapping that was handed out last, if its reader is gone and has not written to it."""
        try:
            mapping, reader = self._handed_out.pop()  # whoever pops it has it alone
        except IndexError:
            return None
        if reader() is not None or digest_of_bytes(tensor_on(mapping)) != self._digest:
            return None
        return mapping


def _nobody() -> None:
    """Be the reference to the reader of what was never handed out."""


def _job_name(group: "dist.ProcessGroup", directory: Path) -> str:
    """Return a name that is the same on all ranks of `group` on this host, and on no other job's.

    The first rank to ask sets it in the store that the job's ranks met through; nobody waits for anybody.
    """
    key = f"{host_name()}/{directory.stat().st_dev}/{dist.get_process_group_ranks(group)}".encode()
    name: bytes = job_store().compare_set(
        f"offload/{xxhash.xxh3_128_hexdigest(key)}", "", os.urandom(12).hex()
    )
    return name.decode()
