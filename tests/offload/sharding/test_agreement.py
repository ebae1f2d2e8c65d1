"""What ranks agree on follows from the log alone, in an order that all of them save in."""

import random

import pytest

from offload.sharding.agreement import Agreement


class Log:
    """A store of the job, in this process."""

    def __init__(self) -> None:
        self._told: dict[str, bytes] = {}

    def get(self, name: str) -> bytes | None:
        return self._told.get(name)

    def append(self, name: str, value: str) -> bytes:
        self._told[name] = self._told.get(name, b"") + value.encode()
        return self._told[name]


def ranks_of(num: int) -> list[Agreement]:
    log = Log()
    return [Agreement(log, "log", rank=rank, num_ranks=num) for rank in range(num)]


def digests(letters: str) -> list[bytes]:
    return [letter.encode() * 16 for letter in letters]


def letters(agreement: Agreement) -> str:
    return "".join(chr(digest[0]) for digest in agreement.order())


@pytest.mark.parametrize(
    ("first", "second", "agreed"),
    [
        ("abcd", "abcd", "abcd"),
        ("abcd", "xaybzcd", "abcd"),
        ("abcd", "dabc", "abc"),
        ("abcd", "bcda", "bcd"),
        ("abcdef", "abdcef", "abdef"),
        ("abcab", "cab", "ab"),
        ("ab", "cd", ""),
    ],
)
def test_agreed_is_what_stands_in_one_order_on_all_ranks(first: str, second: str, agreed: str) -> None:
    ranks = ranks_of(2)
    ranks[0].announce(digests(first))
    ranks[1].announce(digests(second))
    ranks[0].read()
    assert letters(ranks[0]) == letters(ranks[1]) == agreed


@pytest.mark.parametrize("seed", range(20))
def test_who_has_read_less_knows_less_and_nothing_else(seed: int) -> None:
    chance = random.Random(seed)
    ranks = ranks_of(3)
    left = [chance.sample("abcdefghijkl", chance.randrange(6, 13)) for _ in ranks]
    known = [""] * 3
    while any(left):
        number = chance.choice([number for number in range(3) if left[number]])
        cut = chance.randrange(1, len(left[number]) + 1)
        ranks[number].announce(digests("".join(left[number][:cut])))
        del left[number][:cut]
        for reader in chance.sample(range(3), 2):
            ranks[reader].read()
            assert set(known[reader]) <= set(letters(ranks[reader]))
            known[reader] = letters(ranks[reader])
    for each in ranks:
        each.close()
        assert not each.is_closed or each is ranks[-1]
    for each in ranks:
        each.read()
        assert each.is_closed
    assert letters(ranks[0]) == letters(ranks[1]) == letters(ranks[2])


def test_what_follows_the_end_is_void() -> None:
    ranks = ranks_of(2)
    ranks[0].announce(digests("ab"))
    ranks[1].announce(digests("a"))
    ranks[0].end()
    ranks[1].announce(digests("b"))
    assert letters(ranks[0]) == letters(ranks[1]) == "a"
