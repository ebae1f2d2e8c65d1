"""Law 4, fresh, save by save: random programs of saves and writes on one storage, seen and blind."""

from collections.abc import Sequence
from functools import cache

import pytest

from offload import SavedTensorStore
from tests.conftest import SEED
from tests.laws.outcomes import Outcome, is_allowed
from tests.laws.programs import draw, run
from tests.laws.settings import STORES, plain

NUM_PROGRAMS = 150
# Programs that once gave a third result.
KNOWN: Sequence[tuple[str, ...]] = (
    ("start many", "save alias", "save", "exit", "write few"),
    ("start many", "save", "save alias", "exit", "blind few"),
    ("start many", "save", "write few", "save alias", "exit", "blind one"),
    ("start few", "save", "blind one", "save unrelated", "exit", "blind other"),
    ("start many", "save", "blind few", "save unrelated", "exit", "blind other"),
    ("start many", "save window", "blind few", "save", "exit", "blind other"),
    (
        "start many",
        "save",
        "save unrelated",
        "blind other",
        "save",
        "blind many",
        "save twin many",
        "exit",
        "blind one",
    ),
    ("start many", "save twin many", "save", "blind few", "save", "exit", "blind twin"),
    ("start many", "save", "save t", "save twin many", "exit", "write twin", "write few"),
)


@cache
def expected(program: tuple[str, ...]) -> tuple[list[Outcome], list[Outcome]]:
    """Return the outcomes without hooks and the right ones, save by save."""
    return run(program, around=plain()), run(program, around=plain(), alone=True)


def breaches(program: Sequence[str], *, store: SavedTensorStore) -> list[str]:
    """Return the saves of a program for which the store gives a third result."""
    without, right = expected(tuple(program))
    got = run(program, around=store)
    # A tensor that two counters watch is written behind one of them.
    blind = any(word.startswith("blind") or word == "save alias" for word in program)
    return [
        f"{', '.join(program)}: save {number}: {each.refused_by or 'a third result'}"
        for number, each in enumerate(got)
        if not is_allowed(each, plain=without[number], right=right[number], blind=blind)
    ]


@pytest.mark.parametrize("program", KNOWN, ids=" | ".join)
def test_a_known_program_gives_no_third_result(program: tuple[str, ...]) -> None:
    wrong = {name: breaches(program, store=make()) for name, make in STORES.items()}
    assert not any(wrong.values()), {name: each for name, each in wrong.items() if each}


@pytest.mark.parametrize("blind", [False, True], ids=["seen", "blind"])
def test_random_programs_give_no_third_result(blind: bool, *, store: SavedTensorStore) -> None:
    """One store serves them all, so that whatever one leaves behind meets the next."""
    wrong = []
    for number in range(NUM_PROGRAMS):
        wrong += breaches(draw(SEED * NUM_PROGRAMS + number, blind=blind), store=store)
    assert not wrong, f"{len(wrong)}: " + "\n".join(sorted(wrong, key=len)[:12])
    assert store.stats.held_bytes == 0


def test_the_programs_meet_refusals_and_harm() -> None:
    """So that the test above says something: plain autograd refuses often, and is often wrong in silence."""
    num_refused = num_wrong = 0
    for number in range(NUM_PROGRAMS):
        for without, right in zip(*expected(tuple(draw(number, blind=True))), strict=True):
            num_refused += bool(without.refused_by)
            num_wrong += not without.refused_by and without != right
    assert num_refused > NUM_PROGRAMS / 4
    assert num_wrong > NUM_PROGRAMS / 4
