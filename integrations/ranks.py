"""The ranks of a `torchrun` job that train one model together, each on its share of every batch."""

from __future__ import annotations

import gc
import os
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from integrations.errors import CommandError, told_as_command_error

_Item = TypeVar("_Item")


class Ranks:
    """This rank among the others; one rank alone where no process group was joined."""

    def __init__(self) -> None:
        joined = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if joined else 0
        self.num_ranks = dist.get_world_size() if joined else 1

    @property
    def is_first(self) -> bool:
        """Whether this rank writes and prints for all."""
        return self.rank == 0

    def share_of(self, batch: Sequence[_Item]) -> tuple[Sequence[_Item], float]:
        """This rank's rows of a batch that all ranks have drawn alike, and the weight of their loss.

        A rank that a short batch leaves without rows takes one at weight 0: its gradients are zeros then, and
        not missing.
        """
        share = batch[self.rank :: self.num_ranks]
        return (share, 1.0) if share else (batch[:1], 0.0)

    def sum(self, value: float) -> float:
        """The sum of a number over all ranks."""
        if self.num_ranks == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total)

    def largest(self, value: int) -> int:
        """The largest of a whole number over all ranks."""
        if self.num_ranks == 1:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def gathered(self, item: _Item) -> list[_Item]:
        """What each rank has, in their order, on every rank; it travels pickled."""
        if self.num_ranks == 1:
            return [item]
        items = [item] * self.num_ranks
        dist.all_gather_object(items, item)
        return items

    def wait(self) -> None:
        """Wait until every rank is here."""
        if self.num_ranks > 1:
            dist.barrier()


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """Join the other ranks where `torchrun` started this process; leave them at the end.

    Arguments:
        device: "cuda" takes the one of this rank's number on its host.

    Raises:
        CommandError: the ranks cannot meet, or one of them has stopped while this one waited for it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield Ranks()
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with told_as_command_error(RuntimeError, ValueError):
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        yield Ranks()
    except CommandError as error:
        _let_go(error)
        raise
    except RuntimeError as error:
        if not _is_about_ranks(error):
            raise
        said = re.sub(r"^\[\S*\] ", "", " ".join(str(error).split())).partition(". ")[0]
        _let_go(error)
        raise CommandError(
            f"another rank stopped, or cannot be reached any more, while this one waited for it ({said}): "
            "see what that one said, then start all ranks again with --resume"
        ) from None
    finally:
        dist.destroy_process_group()


def _let_go(error: BaseException) -> None:
    # A group that what broke off still holds at the interpreter's end aborts the process.
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    gc.collect()


def _is_about_ranks(error: RuntimeError) -> bool:
    # Gloo's errors have no type of their own, but say where in its source they come from.
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)
