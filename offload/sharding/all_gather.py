"""Each rank holds a range of what all ranks hold alike, and gathers the others' when backward needs them.

What is saved between two backwards of a step is one stretch. In forward the ranks announce what they hold in
a log that all of them read alike, and nobody waits; the first unpack closes it, and from then on every rank
knows the same list and takes part in gathering it.
"""

import time
import weakref

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from offload.part import Lease
from offload.sharding.agreement import Agreement
from offload.sharding.base import MIN_BYTES, Sharding, Traffic
from offload.sharding.channel import Channel
from offload.sharding.gathers import Gathers, ShardLease, range_bytes
from offload.sharding.group import group_key, group_of, job_store
from offload.stats import Ledger

_LEAST_PAUSE_SECONDS = 0.0005
_MOST_PAUSE_SECONDS = 0.01


class AllGather(Sharding):
    """Sharding in equal ranges of bytes, over any ranks.

    Args:
        group: whose ranks share, all ranks where None. With a device mesh, `mesh.get_group("name")`. Every
            rank of it enters the store as often as the others.
        timeout_seconds: how long a rank waits in backward for the others to come to a gather.

    The first unpack of a stretch waits for the other ranks to get there too, at most a quarter of the timeout
    and less each time that they did not: what they announce meanwhile is shared. A process group of gloo,
    used for nothing else, is made at the first gather and kept for all stores of the group. Tensors on other
    devices than the CPU stay where they are.
    """

    def __init__(self, *, group: "dist.ProcessGroup | None" = None, timeout_seconds: float = 60.0) -> None:
        if timeout_seconds <= 0:
            raise ValueError(f"AllGather: timeout_seconds is {timeout_seconds}; give more than 0")
        self._group = group
        self._timeout_seconds = timeout_seconds
        self._joined: dist.ProcessGroup | None = None
        self._member: _Member | None = None
        self._stretch: _Stretch | None = None

    @property
    def is_joined(self) -> bool:
        """Whether there are other ranks, and none of them was lost."""
        return self._member is not None and self._member.channel.failure is None

    @property
    def is_near(self) -> bool:
        """Return False: reading takes all ranks."""
        return False

    def begin_step(self, ledger: Ledger) -> None:
        """Find the other ranks at the first call; begin another step of the same number on all of them."""
        group = group_of(self._group)
        if group is None:
            return
        if group is not self._joined:
            self._joined, self._member = group, _join(group, timeout_seconds=self._timeout_seconds)
        if self._member is not None:
            self._stretch = None
            self._member.begin_step(ledger)

    def announce(self, digest: bytes) -> None:
        """Tell it at the next look."""
        if not self.is_joined or self._member is None:
            return
        if self._stretch is None or self._stretch.is_closed:
            self._stretch = self._member.next_stretch()
        self._stretch.announce(digest)

    def look(self) -> None:
        """Tell what was announced, and read what others told."""
        if self._stretch is not None and self.is_joined:
            self._stretch.look()

    def num_holders(self, digest: bytes) -> int:
        """Return the ranks of the group if all of them announced these bytes in this stretch, else 1."""
        if self._stretch is None or self._member is None or digest not in self._stretch.agreement.agreed:
            return 1
        return self._member.channel.num_ranks

    def place(self, flat: Tensor, digest: bytes) -> Lease | None:
        """Return a lease of this rank's range if all ranks announced these bytes."""
        if self._stretch is None or digest not in self._stretch.agreement.agreed:
            return None
        if not self.is_joined or flat.device.type != "cpu" or flat.numel() < MIN_BYTES:
            return None
        return self._stretch.lease(flat, digest)

    def begin_backward(self) -> bool:
        """Close the stretch at its first unpack: from here on the list of gathers is fixed."""
        if self._stretch is None or self._stretch.is_closed or not self.is_joined:
            return False
        self._stretch.close()
        return True

    def group_held_bytes(self, held_bytes: int) -> int:
        """Return the sum over the ranks, each as it last told."""
        return held_bytes if self._member is None else self._member.sum_held(held_bytes)

    @property
    def traffic(self) -> Traffic:
        """What was gathered since `begin_step`, and how long that took."""
        return Traffic() if self._member is None else self._member.traffic()


class _Member:
    """This rank's place in the group, for one store."""

    def __init__(self, channel: Channel, *, store: Store, key: str, number: int) -> None:
        self.channel = channel
        self.patience_seconds = channel.patience_seconds
        self._store = store
        self._key = key
        self._number = number
        self._num_steps = 0
        self._num_stretches = 0
        self._ledger = Ledger()
        self._before = Traffic()

    def begin_step(self, ledger: Ledger) -> None:
        """Count the step, which all ranks count alike."""
        self._num_steps += 1
        self._num_stretches = 0
        self._ledger = ledger
        self._before = Traffic(self.channel.gathered_bytes, self.channel.waited_seconds)

    def next_stretch(self) -> "_Stretch":
        """Begin the next stretch of this step."""
        self._num_stretches += 1
        number = self._number, self._num_steps, self._num_stretches
        agreement = Agreement(
            self._store,
            "/".join(map(str, (self._key, *number))),
            rank=self.channel.rank,
            num_ranks=self.channel.num_ranks,
        )
        return _Stretch(self, agreement, number=number, ledger=self._ledger)

    def sum_held(self, held_bytes: int) -> int:
        """Tell what this rank holds, and return the sum of what was told."""
        try:
            self._store.set(f"{self._key}/{self._number}/held/{self.channel.rank}", str(held_bytes))
            others = [
                f"{self._key}/{self._number}/held/{rank}"
                for rank in range(self.channel.num_ranks)
                if rank != self.channel.rank
            ]
            return held_bytes + sum(int(self._store.get(key)) for key in others if self._store.check([key]))
        except RuntimeError:  # the job's store is gone
            return held_bytes

    def traffic(self) -> Traffic:
        """What came since the step began."""
        return Traffic(
            self.channel.gathered_bytes - self._before.gathered_bytes,
            self.channel.waited_seconds - self._before.waited_seconds,
        )


class _Stretch:
    """What is saved between two backwards of a step. Leases own it; it refers to them weakly."""

    def __init__(
        self, member: _Member, agreement: Agreement, *, number: tuple[int, int, int], ledger: Ledger
    ) -> None:
        self.agreement = agreement
        self.is_closed = False
        self._member = member
        self._untold: list[bytes] = []
        self._leases: weakref.WeakValueDictionary[bytes, ShardLease] = weakref.WeakValueDictionary()
        self._gathers = Gathers(member.channel, number, ledger=ledger, lease_of=self._leases.get)

    def announce(self, digest: bytes) -> None:
        """Tell it at the next look."""
        self._untold.append(digest)

    def look(self) -> None:
        """Tell and read."""
        try:
            if self._untold and not self.is_closed:
                self.agreement.announce(self._untold)
                self._untold.clear()
            self.agreement.read()
        except RuntimeError as error:
            self._lose_store(error)

    def lease(self, flat: Tensor, digest: bytes) -> ShardLease:
        """Return the lease of these bytes, a new one where none lives."""
        lease = self._leases.get(digest)
        if lease is None:
            channel = self._member.channel
            longest = range_bytes(flat.numel(), channel.num_ranks)
            own = flat[channel.rank * longest : (channel.rank + 1) * longest].clone()
            lease = ShardLease(own, digest=digest, num_all_bytes=flat.numel(), stretch=self)
            self._leases[digest] = lease
        return lease

    def read(self, lease: ShardLease) -> Tensor:
        """Return all bytes of a lease."""
        self.close()  # of an earlier step, of which nothing was unpacked until now
        return self._gathers.read(lease)

    def close(self) -> None:
        """Fix what is agreed, waiting for the other ranks where they are about to come."""
        if self.is_closed:
            return
        began = time.monotonic()
        try:
            self.look()
            self.agreement.close()
            self._wait()
        except RuntimeError as error:
            self._lose_store(error)
        self.is_closed = True
        self._member.channel.waited_seconds += time.monotonic() - began
        self._gathers.fix(list(self.agreement.agreed))

    def _wait(self) -> None:
        until = time.monotonic() + self._member.patience_seconds
        pause_seconds = _LEAST_PAUSE_SECONDS
        self.agreement.read()
        while not self.agreement.is_closed:
            if time.monotonic() > until:
                self.agreement.end()
                self._member.patience_seconds /= 4
            else:
                time.sleep(pause_seconds)
                pause_seconds = min(2 * pause_seconds, _MOST_PAUSE_SECONDS)
            self.agreement.read()
        if self.agreement.is_closed_by_all:
            self._member.patience_seconds = self._member.channel.patience_seconds

    def _lose_store(self, error: RuntimeError) -> None:
        channel = self._member.channel
        channel.failure = channel.failure or (
            f"the store through which the ranks of the job met is gone ({str(error).splitlines()[0]}): the "
            "rank or the launcher that runs it has ended."
        )


def _join(group: dist.ProcessGroup, *, timeout_seconds: float) -> _Member | None:
    """Return this rank's place in `group`; None where the job's store cannot be asked."""
    try:
        # A connection of its own: no other thread's wait is in its way.
        store = job_store().clone()  # type: ignore[attr-defined]
        key = f"offload/{group_key(group)}"
        number = store.add(f"{key}/stores/{dist.get_rank(group)}", 1)
    except (RuntimeError, AttributeError):
        return None
    channel = Channel(group, store=store, key=f"{key}/{number}", timeout_seconds=timeout_seconds)
    return _Member(channel, store=store, key=key, number=number)
