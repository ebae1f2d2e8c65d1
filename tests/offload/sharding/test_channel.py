"""A channel whose other end does not answer."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from offload import RankMismatchError
from offload.ledger import Ledger
from offload.sharding import channel as channels
from offload.sharding.channel import Arriving, Channel
from offload.sharding.gathers import Gathers, ShardLease


class NeverThere:
    """Work that does not end, and notes how long it was waited for."""

    def __init__(self) -> None:
        self.waited: list[timedelta] = []

    def is_completed(self) -> bool:
        return False

    def wait(self, timeout: timedelta) -> None:
        self.waited.append(timeout)
        raise RuntimeError("timed out")


class ThereAfterAll:
    """Work that ends just after a look at it timed out, well or badly."""

    def __init__(self, error: RuntimeError | None) -> None:
        self._has_ended = False
        self._error = error

    def is_completed(self) -> bool:
        return self._has_ended

    def wait(self, timeout: timedelta | None = None) -> None:
        if not self._has_ended:
            self._has_ended = True
            raise RuntimeError("Operation timed out!")
        if self._error is not None:
            raise self._error


@pytest.fixture
def channel(monkeypatch: pytest.MonkeyPatch) -> Channel:
    monkeypatch.setattr(channels.dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(channels.dist, "get_world_size", lambda group: 2)
    told: dict[str, bytes] = {}

    def append(name: str, value: str) -> bytes:
        told[name] = told.get(name, b"") + value.encode()
        return told[name]

    store = SimpleNamespace(get=told.get, append=append)
    return Channel(None, store=store, timeout_seconds=0.05)


def test_no_wait_is_so_short_that_gloo_takes_it_for_none(channel: Channel) -> None:
    work = NeverThere()
    for microseconds in (1, 400, 999, 1500):
        channels._look(work, seconds=microseconds * 1e-6)
    channel.begin_read()
    with pytest.raises(RankMismatchError, match="rank 1 of the group did not come"):
        channel.wait(Arriving(None, work))
    # Gloo counts in whole milliseconds, and 0 is no limit.
    assert min(work.waited) >= timedelta(milliseconds=1)


def test_what_comes_as_a_look_times_out_has_come(channel: Channel) -> None:
    rows = torch.ones(2, 3)
    channel.begin_read()
    assert channel.wait(Arriving(rows, ThereAfterAll(None))) is rows
    assert channel.failure is None


def test_what_fails_as_a_look_times_out_has_failed(channel: Channel) -> None:
    channel.begin_read()
    with pytest.raises(RankMismatchError) as caught:
        channel.wait(Arriving(None, ThereAfterAll(RuntimeError("connection closed"))))
    assert "connection closed" in str(caught.value.__cause__)


def test_a_failure_before_the_order_was_fixed_is_told_as_it_is(channel: Channel) -> None:
    channel.fail("rank 1 was struck by lightning")
    gathers = Gathers(
        channel, (1, 1, 1), ledger=Ledger(), lease_of=lambda digest: None, ask=lambda place: None
    )
    lease = ShardLease(torch.zeros(8, dtype=torch.uint8), digest=bytes(16), num_all_bytes=16, stretch=gathers)
    with pytest.raises(RankMismatchError, match="lightning"):
        lease.read()
