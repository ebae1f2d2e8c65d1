"""The gathers of one stretch of training: in one order on every rank, each once, behind a header, one ahead.

What was agreed last is gathered first, as backward needs it. A rank that unpacks in another order still
gathers in this one, and keeps what it did not ask for yet. What arrived stays until its last handle ends, so
that how often a rank reads it is nobody else's matter. Before the bytes go the headers: ordinal, size and
digest. Where they differ no bytes are sent, and whoever needs them is told.
"""

import contextlib
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from offload.digest import digest_of_bytes
from offload.errors import RankMismatchError
from offload.ledger import Charge, Ledger
from offload.part import Lease
from offload.sharding.channel import Arriving, Channel

_HEADER = struct.Struct("=6q16s16s")


class Header(NamedTuple):
    """What a rank says before its bytes go: which gather, of what, and the digests of all bytes and of its
    own range.
    """

    store: int
    step: int
    stretch: int
    place: int
    num_bytes: int
    is_there: int
    digest: bytes
    range_digest: bytes


class Promise(NamedTuple):
    """A header on its way, and this rank's range that it speaks of, kept until it is sent."""

    header: Arriving
    own: Tensor | None


class Gather(NamedTuple):
    """Bytes on their way, with the memory that they come to and the digest of each rank's range; or the
    reason why there are none.
    """

    arriving: Arriving | None = None
    charge: Charge | None = None
    range_digests: Sequence[bytes] = ()
    refusal: str | None = None


class Stretch(Protocol):
    """Where a lease was agreed."""

    def read(self, lease: "ShardLease") -> Tensor:
        """Return all bytes of the lease."""


class ShardLease(Lease):
    """This rank's range of bytes that all ranks of the group hold together. Owns the range."""

    __slots__ = (
        "__weakref__",
        "_shard",
        "_stretch",
        "_whole",
        "arriving",
        "digest",
        "num_all_bytes",
        "range_digest",
    )

    def __init__(self, shard: Tensor, *, digest: bytes, num_all_bytes: int, stretch: "Stretch") -> None:
        self._shard = shard
        self.digest = digest
        self.range_digest = digest_of_bytes(shard)
        self.num_all_bytes = num_all_bytes
        self.arriving: Gather | None = None
        self._whole: Tensor | None = None
        self._stretch = stretch

    @property
    def num_bytes(self) -> int:
        """Bytes of the range."""
        return self._shard.numel()

    @property
    def is_near(self) -> bool:
        """Return False."""
        return False

    def count_holders(self, num_holders: int) -> bool:
        """All ranks hold it, from the beginning."""
        return False

    def padded(self, num_ranks: int) -> Tensor:
        """Return the range, as long as the longest."""
        num_missing = range_bytes(self.num_all_bytes, num_ranks) - self._shard.numel()
        return torch.cat([self._shard, self._shard.new_zeros(num_missing)]) if num_missing else self._shard

    def read(self) -> Tensor:
        """Gather all ranges; raises RankMismatchError when the others have something else, or do not come."""
        if self._whole is None:
            self._whole = self._stretch.read(self)
        return self._whole

    def read_own(self) -> Tensor:
        """Return a copy."""
        return self.read().clone()


class Gathers:
    """All gathers of one stretch.

    Args:
        channel: to the other ranks.
        number: of the store, the step and the stretch, the same on all ranks.
        ledger: charged for gathered bytes until they are handed out.
        lease_of: the living lease of a digest, if any.
        ask: asks the other ranks to come to a gather, by its number.
    """

    def __init__(
        self,
        channel: Channel,
        number: tuple[int, int, int],
        *,
        ledger: Ledger,
        lease_of: Callable[[bytes], ShardLease | None],
        ask: Callable[[int], None],
    ) -> None:
        self._channel = channel
        self._number = number
        self._ledger = ledger
        self._lease_of = lease_of
        self._ask = ask
        self._order: Sequence[bytes] = ()
        self._places: dict[bytes, int] = {}
        self._promised: dict[int, Promise] = {}
        self._num_begun = 0

    def fix(self, agreed: Sequence[bytes]) -> None:
        """Take the digests of all that was agreed, in order."""
        self._order = tuple(reversed(agreed))
        self._places = {digest: place for place, digest in enumerate(self._order)}

    @property
    def has_begun(self) -> bool:
        """Whether headers have gone out: what this rank holds is told."""
        return bool(self._num_begun or self._promised)

    @property
    def are_begun(self) -> bool:
        """Whether all are done or under way."""
        return self._num_begun == len(self._order)

    def serve(self, place: int) -> None:
        """Come to all gathers up to number `place`. To be called with the channel's lock."""
        if self._num_begun <= place:
            self._channel.begin_read()
            self._begin_up_to(min(place, len(self._order) - 1))

    def read(self, lease: ShardLease) -> Tensor:
        """Return all bytes of `lease`, uint8 `[n]`; `lease.arriving` has their charge."""
        with self._channel.lock:
            if lease.digest not in self._places:
                self._channel.require_whole()  # it failed before the order was fixed
            self._channel.begin_read()
            place = self._places[lease.digest]
            self._begin_up_to(place)
            self._begin_one_ahead(place + 1)
            assert lease.arriving is not None
            return self._finish(lease.arriving, lease)

    def _begin_up_to(self, place: int) -> None:
        while self._num_begun <= place:
            # The next header goes ahead of these bytes, so that it is there when they are asked for.
            for ahead in (self._num_begun, self._num_begun + 1):
                if ahead < len(self._order) and ahead not in self._promised:
                    self._promise(ahead)
            self._exchange(self._num_begun)
            self._num_begun += 1

    def _begin_one_ahead(self, place: int) -> None:
        if place < len(self._order) and self._channel.failure is None:
            with contextlib.suppress(RankMismatchError):  # of the one after; this one may be there
                self._begin_up_to(place)

    def _promise(self, place: int) -> None:
        """Send the header of what this rank has of a gather."""
        digest = self._order[place]
        lease = self._lease_of(digest)
        size, range_digest = (
            (lease.num_all_bytes, lease.range_digest) if lease is not None else (0, bytes(16))
        )
        words = _HEADER.pack(*self._number, place, size, lease is not None, digest, range_digest)
        if not self._channel.has_met:
            self._remind(place)
        header = self._channel.gather_headers(torch.frombuffer(bytearray(words), dtype=torch.uint8))
        own = lease.padded(self._channel.num_ranks) if lease is not None else None
        self._promised[place] = Promise(header, own)

    def _remind(self, place: int) -> None:
        try:
            self._ask(place)
        except RuntimeError as error:
            raise self._channel.lose_store(error) from error

    def _exchange(self, place: int) -> None:
        """Compare the headers, and begin to gather the bytes if all ranks have them."""
        header, own = self._promised[place]
        rows = self._channel.wait(header, remind=partial(self._remind, place))
        del self._promised[place]
        headers = [Header(*_HEADER.unpack(bytes(row.tolist()))) for row in rows]
        if (mix_up := mix_up_of(headers)) is not None:
            raise self._channel.fail(mix_up)
        refusal = refusal_of(headers)
        lease = self._lease_of(self._order[place])
        if refusal is not None or own is None:
            gather = Gather(refusal=refusal)
        else:
            arriving = self._channel.gather_bytes(own)
            charge = self._ledger.charge(arriving.rows.nbytes) if lease is not None else None
            gather = Gather(arriving, charge, [each.range_digest for each in headers])
        if lease is not None:
            lease.arriving = gather

    def _finish(self, gather: Gather, lease: ShardLease) -> Tensor:
        if gather.arriving is None:
            raise RankMismatchError(gather.refusal)
        rows = self._channel.wait(gather.arriving, remind=partial(self._remind, self._places[lease.digest]))
        whole = rows.view(-1)[: lease.num_all_bytes]
        if digest_of_bytes(whole) == lease.digest:
            return whole
        longest = rows.shape[1]
        ranges = [whole[rank * longest : (rank + 1) * longest] for rank in range(len(rows))]
        digests = zip(map(digest_of_bytes, ranges), gather.range_digests, strict=True)
        changed = [str(rank) for rank, (found, agreed) in enumerate(digests) if found != agreed]
        raise RankMismatchError(
            f"its {lease.num_all_bytes} bytes, number {self._places[lease.digest]} of the gathers, are not "
            f"those that were agreed: rank {', '.join(changed) or '?'} of the group holds a range that was "
            "changed since. Run the step again; if it comes back, use shard=False and report it."
        )


def range_bytes(num_bytes: int, num_ranks: int) -> int:
    """Return how long the ranges are into which so many bytes part, the last ones shorter or empty."""
    return -(-num_bytes // num_ranks)


def mix_up_of(headers: Sequence[Header]) -> str | None:
    """Return why headers do not belong to one gather, None if they do; alike on all ranks that got them."""
    if len({(each.store, each.step, each.stretch, each.place) for each in headers}) == 1:
        return None
    seen = "; ".join(
        f"rank {rank} to number {each.place}, stretch {each.stretch} of step {each.step}"
        for rank, each in enumerate(headers)
    )
    return (
        f"the ranks of the group came to different gathers: {seen}. Run the same backwards in the same order "
        "on all ranks."
    )


def refusal_of(headers: Sequence[Header]) -> str | None:
    """Return why the ranks that sent these headers cannot gather, None if they can; alike on all of them."""
    gone = [rank for rank, each in enumerate(headers) if not each.is_there]
    if gone:
        return (
            f"rank {gone[0]} of the group does not hold its range any more, number {headers[0].place} of "
            "the gathers: its graph was freed, or the tensor changed in place. Run the same backward on all "
            "ranks."
        )
    if len({(each.num_bytes, each.digest) for each in headers}) > 1:
        seen = "; ".join(f"rank {rank} {each.num_bytes} bytes" for rank, each in enumerate(headers))
        return f"the ranks of the group hold other bytes as number {headers[0].place} of the gathers: {seen}."
    return None
