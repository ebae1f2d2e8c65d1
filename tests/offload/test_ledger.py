"""The ledger: held bytes, now and at most, of holders that begin and end in any order."""

import gc
import random
import sys
import threading
from collections.abc import Callable
from linecache import getline
from types import FrameType

import pytest
import torch

from offload import fast
from offload.ledger import Charge, Ledger
from offload.stats import Row

SEED = torch.randint(1 << 30, ()).item()


@pytest.fixture(autouse=True, params=[fast.Books, None] if fast.Books is not None else [None])
def books(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test with the books in Python, and with the compiled ones where there are some."""
    monkeypatch.setattr(fast, "Books", request.param)


class Holder:
    """Something that can be referred to weakly."""


def hold(ledger: Ledger, key: int, *, num_bytes: int, row: Row | None = None) -> Holder:
    holder = Holder()
    ledger.claim(holder, key=key, num_bytes=num_bytes, storage_bytes=num_bytes, row=row)
    return holder


def test_charges_end_in_any_order() -> None:
    ledger = Ledger()
    charges = [ledger.charge(size) for size in (5, 7, 11)]
    assert ledger.read() == (23, 23)
    del charges[1]
    assert ledger.read() == (16, 23)
    ledger.begin_step()
    charges.append(ledger.charge(1))
    assert ledger.read() == (17, 17)
    charges.clear()
    assert ledger.read() == (0, 17)


def test_the_peak_is_that_of_the_moment_however_late_it_is_read() -> None:
    random_numbers = random.Random(SEED)
    for _ in range(50):
        ledger, living, held, peak = Ledger(), [], 0, 0
        for _ in range(random_numbers.randrange(1, 3000)):
            if living and random_numbers.random() < 0.5:
                charge, num_bytes = living.pop(random_numbers.randrange(len(living)))
                del charge
                held -= num_bytes
            else:
                num_bytes = random_numbers.randrange(100)
                living.append((ledger.charge(num_bytes), num_bytes))
                held += num_bytes
            peak = max(peak, held)
        assert ledger.read() == (held, peak)


def test_what_several_hold_is_held_once_until_the_last_one_ends() -> None:
    ledger = Ledger()
    first, second = hold(ledger, 1, num_bytes=10), hold(ledger, 1, num_bytes=10)
    charge = ledger.charge(10, key=1, storage_bytes=10)
    other = hold(ledger, 2, num_bytes=3)
    assert ledger.read() == (13, 13)
    del first, charge
    assert ledger.read() == (13, 13)
    del second
    assert ledger.read() == (3, 13)
    del other


def test_a_key_that_comes_back_is_something_new() -> None:
    """An address is free for the next storage as soon as its last holder has ended."""
    ledger = Ledger()
    for num_bytes in range(1, 500):
        hold(ledger, 1, num_bytes=num_bytes)
    assert ledger.read() == (0, 499)
    assert ledger.storage_bytes == 499 * 500 // 2
    assert not ledger._books.living
    assert not ledger._books.held


def test_storages_are_counted_once_a_step_and_rows_count_every_save() -> None:
    ledger, row = Ledger(), Row("here", shape=(3,), dtype=torch.float32)
    holders = [hold(ledger, 1, num_bytes=12, row=row) for _ in range(3)]
    assert ledger.storage_bytes == 12
    assert (row.num_by_stage, row.kept_bytes) == ({"reference": 3}, 12)
    ledger.begin_step()
    assert ledger.storage_bytes == 0
    holders.append(hold(ledger, 1, num_bytes=12))
    assert ledger.storage_bytes == 12


def test_what_is_charged_on_its_own_adds_up_and_what_has_a_key_does_not() -> None:
    ledger = Ledger()
    charges = [ledger.charge(12), ledger.charge(5, key=1), ledger.charge(7)]
    assert ledger.charged_bytes == 19
    del charges
    assert ledger.charged_bytes == 19


def test_a_reading_from_inside_the_collector_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fast, "Books", None)  # no collector runs inside the compiled ones
    ledger = Ledger()
    inner: list[tuple[int, int]] = []

    class Reading(Row):
        def count(self, stage: str, *, kept_bytes: int = 0) -> None:
            inner.append(ledger.read())
            super().count(stage, kept_bytes=kept_bytes)

    row = Reading("here", shape=(3,), dtype=torch.float32)
    holders = [hold(ledger, key, num_bytes=12, row=row) for key in range(5)]
    del holders[2]
    assert ledger.read() == (48, 60)
    assert len(inner) == 5


def test_holders_in_a_cycle_are_given_back_by_the_collector() -> None:
    ledger = Ledger()
    holder = hold(ledger, 1, num_bytes=12)
    holder.itself = holder
    del holder
    gc.collect()
    assert ledger.read() == (0, 12)


def test_threads_may_charge_and_end_at_once() -> None:
    ledger = Ledger()
    left: list[Charge] = []

    def work() -> None:
        charges = [ledger.charge(1) for _ in range(5000)]
        left.append(charges.pop())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held, peak = ledger.read()
    assert held == 8
    assert 5000 <= peak <= 40_000
    left.clear()
    assert ledger.read()[0] == 0
    assert len(ledger.log) < 2000


def test_a_step_mends_what_an_interrupt_cut_short() -> None:
    """Of any line, wherever it stood."""
    for number in range(110):
        ledger, charges = Ledger(), []
        interrupt = interrupting(number)
        sys.settrace(interrupt)
        try:
            charges.extend(ledger.charge(size) for size in (5, 7, 11))
            del charges[0]
            ledger.read()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        ledger.begin_step()
        alive = sum({7, 11} & {charge.claim.num_bytes for charge in charges})
        alive += 5 * any(charge.claim.num_bytes == 5 for charge in charges)
        assert ledger.read() == (alive, alive), number
        charges.clear()
        ledger.begin_step()
        assert ledger.read() == (0, 0), number


def interrupting(number: int) -> Callable[..., object]:
    """Return a tracer that interrupts the `number`th line of the ledger that is run, but for the one in a
    `finally`: a signal is not looked for between an exception and that.
    """
    left = [number]

    def trace(frame: FrameType, event: str, _: object) -> object:
        if not frame.f_code.co_filename.endswith(("ledger.py", "books.py")):
            return None
        if event == "line" and "_is_booking = False" not in getline(frame.f_code.co_filename, frame.f_lineno):
            left[0] -= 1
            if left[0] == -1:
                raise KeyboardInterrupt
        return trace

    return trace


def test_what_grew_between_two_holders_is_held_as_it_is() -> None:
    ledger = Ledger()
    first = hold(ledger, 1, num_bytes=12)
    second = hold(ledger, 1, num_bytes=40)
    assert ledger.read() == (40, 40)
    del first
    ledger.begin_step()
    assert ledger.read() == (40, 40)
    del second
    assert ledger.read() == (0, 40)
