"""The context manager: the two hooks and the order of the stages.

pack:   select -> lift -> (once the op has returned) dedupe -> encode -> Handle
unpack: Handle -> decode -> lay -> tensor
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import methodcaller
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._autograd import _get_sequence_nr
from torch.autograd.graph import saved_tensors_hooks

from offload.codecs import DEFAULT_CODECS
from offload.codecs.base import Codec
from offload.distributed import Distributed
from offload.fast import Packer
from offload.handle import Handle, Kept
from offload.ledger import MOST_LINES, Ledger
from offload.patience import Line, Patience
from offload.pending import LEAST_BYTES, Late
from offload.report import report_text
from offload.select import Kind, is_parameter, kind_of, plain_storage
from offload.settle import Settler
from offload.sharding import sharding_of
from offload.sharding.base import Sharding
from offload.sharding.local import Local
from offload.site import Sites
from offload.stats import Counts, Row, Stats

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from offload import _fast


_Key = tuple[tuple[int, int], torch.Size, torch.dtype, bool]
"""Saves that are counted together: calling instruction, shape, dtype, and whether they are dense."""


class _Seen(NamedTuple):
    """Where such saves are counted, what is known of their line of code, of reading them, and whether a codec
    may ask for them.
    """

    row: Row
    line: Line
    reading: Patience
    is_offered: bool


class SavedTensorStore:
    """Holds what autograd saves inside the context, each content once.

    Use it around any part of a training step; backward may run in or after the context. It may be entered
    again, and from several threads. What it holds belongs to the autograd graph: the graph's end, by backward
    or by being dropped, frees it.

    Args:
        dedupe: keep one payload per storage and version, and per content. Without it every save gets a copy
            of its own: what a store that copies each save would hold.
        uniquify: hold tensors of few distinct scalars or rows as a table and a packed index, without losing a
            bit. True takes the default codecs; a sequence of codecs takes those.
        shard: hold once what several ranks hold alike: True, the name of a policy ("auto", which is what
            True takes, "shared-memory" or "all-gather"), or a policy of `offload.sharding`. With one rank or
            no process group it does nothing.
        group: whose ranks share, all where None: a process group, or one dimension of a device mesh.
        min_bytes: tensors on smaller storages are kept by reference: a look at one takes some 0.1 ms, however
            small it is. Lower it where many small tensors make up what is saved.

    Raises:
        TypeError: `uniquify` holds something that is not a codec.
        ValueError: `min_bytes` is negative, `shard` names no policy, or is given without `dedupe`, whose
            hashes it goes by; `group` is given without the name of a policy, or has several dimensions.
    """

    def __init__(
        self,
        *,
        dedupe: bool = True,
        uniquify: bool | Sequence[Codec] = False,
        shard: bool | str | Sharding = False,
        group: "dist.ProcessGroup | DeviceMesh | None" = None,
        min_bytes: int = 1 << 14,
    ) -> None:
        if min_bytes < 0:
            raise ValueError(f"SavedTensorStore: min_bytes is {min_bytes} bytes; give 0 or more")
        if shard and not dedupe:
            raise ValueError(
                f"SavedTensorStore: shard={shard!r} goes by the hashes of dedupe; drop dedupe=False"
            )
        self._ledger = Ledger()
        self._counts = Counts()
        sharding = sharding_of(shard=shard, group=group)
        self._settler = Settler(
            _codecs_of(uniquify=uniquify),
            dedupe=dedupe,
            min_bytes=min_bytes,
            sharding=sharding,
            ledger=self._ledger,
        )
        self._is_alone = isinstance(sharding, Local)
        self._sites = Sites()
        self._lines: dict[tuple[tuple[int, int], torch.dtype, bool], Line] = {}
        self._seen: dict[_Key, _Seen] = {}
        self._lock = threading.RLock()
        self._entered = _Entered()
        self._num_entered = 0
        self._min_bytes = min_bytes
        self._dedupe = dedupe
        self._packer: _fast.Packer | None = None
        """While it is entered: it has the store, and a store goes with its last reference."""

    def _short_way(self) -> "_fast.Packer | None":
        """Return what packs the saves that are kept without a look at their bytes, if it was compiled."""
        if Packer is None or not self._dedupe:
            return None
        packer = Packer(
            pack_whole=self._pack,
            tensor=Tensor,
            parameter=nn.Parameter,
            ours=self._sites.ours,
            seen=self._seen,
            records=self._settler.storages.records,
            log=self._ledger.log,
            offers_append=self._settler.offers.waiting.append,
            arrivals=self._settler.queue.arrivals,
            late=Late,
            sequence_nr=_get_sequence_nr,
            least_bytes=LEAST_BYTES,
            min_bytes=self._min_bytes,
            most_lines=MOST_LINES,
        )
        packer.room_bytes = self._settler.queue.room_bytes if self._is_alone else -1
        return packer

    def __enter__(self) -> "SavedTensorStore":
        # Alone there is nothing to do but open: called hundreds of times a step, with cold caches.
        unpack = methodcaller("open") if self._is_alone else self._unpack
        hooks = saved_tensors_hooks(self._begin(), unpack)
        try:
            hooks.__enter__()
        except BaseException:
            self._end()
            raise
        self._entered.hooks.append(hooks)
        return self

    def _begin(self) -> Callable[[Tensor], object]:
        """Begin a step where none is under way; return what packs."""
        with self._lock:
            if self._num_entered == 0:
                self._settler.begin_step()
                # What the last step saved comes again. What it did not goes: every step may have new shapes.
                for key in [key for key, seen in self._seen.items() if not seen.row.num_by_stage]:
                    del self._seen[key]
                self._counts.begin_step()
                self._packer = self._short_way()
            self._num_entered += 1
            return self._packer.pack if self._packer is not None else self._pack

    def _end(self) -> None:
        with self._lock:
            self._num_entered -= 1
            if not self._num_entered:
                self._packer = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._entered.hooks.pop().__exit__(kind, error, traceback)
        with self._lock:
            self._end()
            if kind is None:
                self._settler.settle_all()
            else:
                self._settler.drop_all()
            self._ledger.book()

    @property
    def stats(self) -> Stats:
        """What was saved since the outermost enter, and what is held now, in bytes."""
        with self._lock:
            self._settler.settle_all()
            held_bytes, peak_held_bytes = self._ledger.read()  # and books what the counts are short of
            traffic = self._settler.sharer.traffic
            return replace(
                self._counts.stats(held_bytes, peak_held_bytes),
                storage_bytes=self._ledger.storage_bytes,
                group_held_bytes=self._settler.sharer.group_held_bytes(held_bytes),
                gathered_bytes=traffic.gathered_bytes,
                waited_seconds=traffic.waited_seconds,
            )

    def rows(self) -> list[Row]:
        """Return what was saved since the outermost enter by line of code, shape and dtype: the report for
        programs.
        """
        with self._lock:
            self._settler.settle_all()
            self._ledger.book()
            return self._counts.list_rows()

    def report(self) -> str:
        """Return a table for people: totals, then the lines of code that saved most and what became of it."""
        return report_text(self.stats, self.rows())

    def _pack(self, tensor: Tensor) -> Handle | Kept | Distributed:
        with self._lock:
            settler = self._settler
            if not self._is_alone:
                settler.sharer.begin_pack()
            if settler.queue.num_saves:
                settler.settle_returned()
            if is_parameter(tensor):
                return self._keep(tensor, "parameter")
            storage = plain_storage(tensor)
            if storage is None:
                return self._pack_apart(tensor)
            # Dense tensors and views of one line are apart: a matrix product saves an input and a transposed
            # weight.
            key = self._sites.calling(), tensor.shape, tensor.dtype, tensor.is_contiguous()
            row, line, _, _ = self._seen.get(key) or self._see(key)
            handle = settler.admit(tensor, storage, row=row, line=line)
            if self._packer is not None and self._is_alone:
                self._packer.room_bytes = settler.queue.room_bytes
            return handle

    def _pack_apart(self, tensor: Tensor) -> Kept | Distributed:
        """Pack a DTensor, or what has no plain storage."""
        if kind_of(tensor) is Kind.DISTRIBUTED:
            return Distributed(tensor, pack_local=self._pack)
        return self._keep(tensor, "opaque")

    def _keep(self, tensor: Tensor, stage: str) -> Kept:
        """Pack what no stage touches."""
        shape = torch.Size() if tensor.is_nested else tensor.shape  # a nested tensor has none
        key = self._sites.calling(), shape, tensor.dtype, False
        seen = self._seen.get(key) or self._see(key)
        seen.row.count(stage)
        return self._settler.references.keep_apart(tensor)

    def _see(self, key: _Key) -> _Seen:
        """Return what is known of such saves, from now on."""
        site, shape, dtype, is_dense = key
        row = self._counts.row(self._sites.name(site), shape=shape, dtype=dtype)
        line = self._lines.get((site, dtype, is_dense))
        if line is None:
            line = self._lines[site, dtype, is_dense] = Line()
        is_offered = self._settler.has_codecs and dtype.itemsize == 2
        seen = self._seen[key] = _Seen(row, line, line.reading, is_offered)
        return seen

    def _unpack(self, handle: Handle | Kept | Distributed) -> Tensor:
        if self._settler.sharer.is_open:
            with self._lock:
                self._settler.begin_backward()
        return handle.open()


class _Entered(threading.local):
    """The hooks that this thread has entered; autograd's hooks are thread-local too."""

    def __init__(self) -> None:
        self.hooks: list[saved_tensors_hooks] = []


def _codecs_of(*, uniquify: bool | Sequence[Codec]) -> tuple[Codec, ...]:
    if isinstance(uniquify, bool):
        return DEFAULT_CODECS if uniquify else ()
    codecs = tuple(uniquify)
    for codec in codecs:
        if not isinstance(codec, Codec):
            raise TypeError(
                f"SavedTensorStore: uniquify holds {codec!r}; give True, False or a sequence of Codec objects"
            )
    return codecs
