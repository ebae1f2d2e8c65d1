"""Each rank holds a range of what all ranks hold alike, and gathers the others' when backward needs them.

What is saved between two backwards of a step is one stretch. In forward the ranks announce what they hold in
a log that all of them read alike, and nobody waits; the first unpack closes it, and from then on every rank
knows the same list and takes part in gathering it.
"""

import contextlib
from collections import deque

import torch.distributed as dist
from torch import Tensor

from offload.ledger import Ledger
from offload.part import Lease
from offload.sharding.agreement import Agreement
from offload.sharding.base import Sharding, Traffic
from offload.sharding.channel import Channel
from offload.sharding.group import group_key, group_of
from offload.sharding.job_store import JobStore
from offload.sharding.stretch import Stretch
from offload.sharding.waiting import Waiting

_NUM_LOGGED_STEPS = 16
"""A rank so many steps behind rank 0 shares nothing with it."""


class AllGather(Sharding):
    """Sharding in equal ranges of bytes, over any ranks.

    Args:
        group: whose ranks share, all ranks where None. With a device mesh, `mesh.get_group("name")`. All of
            them enter the store equally often, not counting where nothing is saved.
        timeout_seconds: how long a rank waits in backward for the others to come to a gather.

    The first unpack of a stretch waits for the other ranks to get there too, at most a quarter of the timeout
    and less each time that they did not: what they announce meanwhile is shared. Process groups of gloo, used
    for nothing else, are made at the first gather and live as long as the store: keep one store for all
    steps. Tensors on other devices than the CPU stay where they are.
    """

    def __init__(self, *, group: "dist.ProcessGroup | None" = None, timeout_seconds: float = 60.0) -> None:
        if timeout_seconds <= 0:
            raise ValueError(f"AllGather: timeout_seconds is {timeout_seconds}; give more than 0")
        self._group = group
        self._timeout_seconds = timeout_seconds
        self._joined: dist.ProcessGroup | None = None
        self._member: _Member | None = None
        self._stretch: Stretch | None = None

    @property
    def is_joined(self) -> bool:
        """Whether there are other ranks, and none of them was lost."""
        return self._member is not None and self._member.channel.failure is None

    @property
    def is_near(self) -> bool:
        """Return False: reading takes all ranks."""
        return False

    def begin_step(self, ledger: Ledger) -> None:
        """Find the other ranks at the first call."""
        group = group_of(self._group)
        self._stretch = None
        if group is None:
            self._joined = self._member = None
        elif group is not self._joined:
            self._joined, self._member = group, _join(group, timeout_seconds=self._timeout_seconds)
        if self._member is not None:
            self._member.begin_step(ledger)

    def begin_stretch(self, *, step: int, stretch: int) -> None:
        """Begin a log of this number."""
        if self._member is not None and self.is_joined:
            self._stretch = self._member.stretch(step, stretch)

    def announce(self, digest: bytes) -> None:
        """Tell it at the next look, unless the stretch is closed."""
        if self._stretch is not None and not self._stretch.is_closed and self.is_joined:
            self._stretch.announce(digest)

    def look(self) -> None:
        """Tell what was announced, and read what others told."""
        if self._stretch is not None and self.is_joined:
            self._stretch.look()

    def num_holders(self, digest: bytes) -> int:
        """Return the ranks of the group if all of them announced these bytes in this stretch, else 1."""
        if self._stretch is None or self._member is None or digest not in self._stretch.agreement:
            return 1
        return self._member.channel.num_ranks

    def place(self, flat: Tensor, digest: bytes) -> Lease | None:
        """Return a lease of this rank's range if all ranks announced these bytes."""
        if self._stretch is None or digest not in self._stretch.agreement or not self.is_joined:
            return None
        return self._stretch.lease(flat, digest)

    def close(self, *, patiently: bool) -> bool:
        """Close the stretch, at its first unpack or its step's end: the list of gathers is fixed."""
        if self._stretch is None or self._stretch.is_closed or not self.is_joined:
            return False
        self._stretch.close(patiently=patiently)
        return True

    def begin_serving(self) -> None:
        """Come to gathers that other ranks wait for, whatever this one does."""
        if self._stretch is not None:
            self._stretch.begin_serving()

    def group_held_bytes(self, held_bytes: int) -> int:
        """Return the sum over the ranks, each as it last told."""
        return held_bytes if self._member is None else self._member.sum_held(held_bytes)

    @property
    def traffic(self) -> Traffic:
        """What was gathered since `begin_step`, and how long that took."""
        return Traffic() if self._member is None else self._member.traffic()


class _Member:
    """This rank's place in the group, for one store."""

    def __init__(self, channel: Channel, *, store: JobStore, number: int) -> None:
        self.channel = channel
        self._waiting = Waiting(
            store, rank=channel.rank, num_ranks=channel.num_ranks, most_seconds=channel.patience_seconds
        )
        self._store = store
        self._number = number
        self._logs: deque[tuple[int, str]] = deque()
        self._ledger = Ledger()
        self._before = Traffic()

    def begin_step(self, ledger: Ledger) -> None:
        """Count what is gathered anew."""
        self._ledger = ledger
        self._before = Traffic(self.channel.gathered_bytes, self.channel.waited_seconds)

    def stretch(self, step: int, number: int) -> Stretch:
        """Return a stretch of this step."""
        self._remove_logs_before(step - _NUM_LOGGED_STEPS)
        agreement = Agreement(
            self._store, f"log/{step}/{number}", rank=self.channel.rank, num_ranks=self.channel.num_ranks
        )
        self._logs.append((step, agreement.name))
        return Stretch(
            self.channel,
            agreement,
            number=(self._number, step, number),
            waiting=self._waiting,
            ledger=self._ledger,
        )

    def _remove_logs_before(self, step: int) -> None:
        while self._logs and self._logs[0][0] < step:
            _, name = self._logs.popleft()
            if self.channel.rank == 0:
                with contextlib.suppress(RuntimeError):  # a file cannot forget
                    self._store.remove(name)

    def sum_held(self, held_bytes: int) -> int:
        """Tell what this rank holds, and return the sum of what was told."""
        try:
            self._store.set(f"held/{self.channel.rank}", str(held_bytes))
            told = [self._store.get(f"held/{rank}") for rank in range(self.channel.num_ranks)]
        except RuntimeError:  # the job's store is gone
            return held_bytes
        return sum(int(each) for each in told if each is not None)

    def traffic(self) -> Traffic:
        """What came since the step began."""
        return Traffic(
            self.channel.gathered_bytes - self._before.gathered_bytes,
            self.channel.waited_seconds - self._before.waited_seconds,
        )


def _join(group: dist.ProcessGroup, *, timeout_seconds: float) -> _Member | None:
    """Return this rank's place in `group`; None where the job's store cannot be asked."""
    answer_seconds = timeout_seconds / 4
    try:
        name = f"offload/{group_key(group)}"
        ranks = JobStore(name, timeout_seconds=answer_seconds)
        number = ranks.count(f"stores/{dist.get_rank(group)}")
        store = JobStore(f"{name}/{number}", timeout_seconds=answer_seconds)
        channel = Channel(group, store=store, timeout_seconds=timeout_seconds)
        return _Member(channel, store=store, number=number)
    except (RuntimeError, AttributeError):
        return None
