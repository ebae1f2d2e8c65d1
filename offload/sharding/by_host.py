"""The policy that suits where the ranks are: memory where they share a host, all-gather where they do not."""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from offload.ledger import Ledger
from offload.part import Lease
from offload.sharding.base import Sharding, Traffic
from offload.sharding.group import group_key, group_of, host_name, job_store


class ByHost(Sharding):
    """One policy for ranks of one host, another once the group is known to span several.

    Every rank tells its host at the first outermost enter, and nobody waits: until all have told, and for
    the first step of a job in any case, ranks share within their host.

    Args:
        within: the policy for ranks of one host.
        between: the policy for a group on several.
        group: whose hosts are asked for, all ranks where None.
        host: this rank's host, found out where None.
    """

    def __init__(
        self,
        *,
        within: Sharding,
        between: Callable[[], Sharding],
        group: "dist.ProcessGroup | None" = None,
        host: str | None = None,
    ) -> None:
        self._chosen = within
        self._between: Callable[[], Sharding] | None = between
        self._group = group
        self._host = host

    def begin_step(self, ledger: Ledger) -> None:
        """Choose, if all ranks have told their host, and join."""
        if self._between is not None and (group := group_of(self._group)) is not None:
            self._choose(group, self._between)
        self._chosen.begin_step(ledger)

    def _choose(self, group: dist.ProcessGroup, between: Callable[[], Sharding]) -> None:
        try:
            store, prefix = job_store(), f"offload/{group_key(group)}/host"
            keys = [f"{prefix}/{rank}" for rank in range(dist.get_world_size(group))]
            own, host = keys[dist.get_rank(group)], self._host or host_name()
            if not store.check([own]) or store.get(own) != host.encode():
                store.set(own, host)
            elif store.check(keys):
                if len({store.get(key) for key in keys}) > 1:
                    self._chosen = between()
                self._between = None
        except (RuntimeError, AttributeError):
            self._between = None  # the job's store cannot be asked

    @property
    def is_joined(self) -> bool:
        """Whether there are ranks to share with."""
        return self._chosen.is_joined

    @property
    def is_near(self) -> bool:
        """Whether what it places is read without another rank."""
        return self._chosen.is_near

    @property
    def traffic(self) -> Traffic:
        """What came from other ranks."""
        return self._chosen.traffic

    def begin_stretch(self, *, step: int, stretch: int) -> None:
        """Let the chosen policy count: alike on all ranks, whichever step each of them chose at."""
        self._chosen.begin_stretch(step=step, stretch=stretch)

    def look(self) -> None:
        """Let the chosen policy look."""
        self._chosen.look()

    def announce(self, digest: bytes) -> None:
        """Let the chosen policy tell it."""
        self._chosen.announce(digest)

    def num_holders(self, digest: bytes) -> int:
        """Return what the chosen policy knows."""
        return self._chosen.num_holders(digest)

    def place(self, flat: Tensor, digest: bytes) -> Lease | None:
        """Let the chosen policy place it."""
        return self._chosen.place(flat, digest)

    def close(self, *, patiently: bool) -> bool:
        """Let the chosen policy close."""
        return self._chosen.close(patiently=patiently)

    def begin_serving(self) -> None:
        """Let the chosen policy serve."""
        self._chosen.begin_serving()

    def group_held_bytes(self, held_bytes: int) -> int:
        """Return what the chosen policy knows."""
        return self._chosen.group_held_bytes(held_bytes)
