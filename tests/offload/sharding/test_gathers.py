"""Ranges, and the headers that go before them."""

import pytest

from offload import RankMismatchError
from offload.sharding.all_gather import AllGather
from offload.sharding.gathers import Header, mix_up_of, range_bytes, refusal_of


@pytest.mark.parametrize(
    ("num_bytes", "num_ranks", "longest"), [(8, 4, 2), (9, 4, 3), (3, 4, 1), (0, 4, 0), (4097, 3, 1366)]
)
def test_ranges_are_equal_and_cover_all(num_bytes: int, num_ranks: int, longest: int) -> None:
    assert range_bytes(num_bytes, num_ranks) == longest
    ranges = [range(num_bytes)[rank * longest : (rank + 1) * longest] for rank in range(num_ranks)]
    assert [place for each in ranges for place in each] == list(range(num_bytes))


HEADER = Header(1, 2, 1, 5, 4096, 1, b"a" * 16, b"b" * 16)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, None),
        ({"range_digest": b"c" * 16}, None),
        ({"place": 4}, "came to different gathers: rank 0 to number 5.*rank 1 to number 4"),
        ({"step": 3}, "came to different gathers"),
        ({"is_there": 0, "num_bytes": 0}, "rank 1 of the group does not hold its range any more"),
        ({"num_bytes": 8192}, "hold other bytes as number 5 .* rank 0 4096 bytes; rank 1 8192 bytes"),
        ({"digest": b"z" * 16}, "hold other bytes"),
    ],
)
def test_headers_that_differ_are_refused(changed: dict[str, object], message: str | None) -> None:
    headers = [HEADER, HEADER._replace(**changed)]
    refusal = mix_up_of(headers) or refusal_of(headers)
    if message is None:
        assert refusal is None
    else:
        with pytest.raises(RankMismatchError, match=message):
            raise RankMismatchError(refusal)


def test_a_timeout_that_is_not_above_0() -> None:
    with pytest.raises(ValueError, match="timeout_seconds is 0; give more than 0"):
        AllGather(timeout_seconds=0)
