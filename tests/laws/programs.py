"""Random programs of saves and writes on one storage, and what backward gives for each save.

A program is a sequence of words. Each save has a weight of its own, and the weight's gradient is the very
bytes that backward read.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.laws.outcomes import Outcome, gradient_of
from tests.laws.settings import Around

NUM_ROWS, NUM_COLUMNS = 72, 32
FEW = torch.tensor([-0.5, 2.0, -0.0]).repeat(NUM_ROWS * NUM_COLUMNS // 3).view(NUM_ROWS, NUM_COLUMNS)
MANY = torch.linspace(-3, 3, NUM_ROWS * NUM_COLUMNS).sin().view(NUM_ROWS, NUM_COLUMNS)
CONTENTS: Mapping[str, Tensor] = {"few": FEW, "many": MANY, "other": MANY.flip(0) * 3, "one": FEW * 0 + 0.25}


@dataclass(frozen=True)
class Run:
    """One program under way: `x`, an alias of its storage with a counter of its own, and what was saved."""

    alone: bool
    x: Tensor
    alias: Tensor
    saved: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)

    def save(self, tensor: Tensor) -> None:
        factor = tensor.clone() if self.alone else tensor
        weight = torch.ones_like(factor, requires_grad=True)
        self.saved.append((weight * factor, weight))

    def save_twin(self, content: str) -> None:
        """Save equal bytes in another storage, and keep that storage alive."""
        self.kept.append(CONTENTS[content].clone())
        self.save(self.kept[-1])

    def save_again(self) -> None:
        """Save with another operation, so that two saves share the node's number no more."""
        factor = self.x.clone() if self.alone else self.x
        weight = torch.ones_like(factor, requires_grad=True)
        self.saved.append(((weight @ factor.t()).diagonal(), weight))

    def drop(self) -> None:
        """Drop the graph of the oldest save, and keep its place."""
        alive = [number for number, pair in enumerate(self.saved) if pair[0].requires_grad]
        if alive:
            nothing = torch.zeros(())
            self.saved[alive[0]] = nothing, nothing


SAVES: Mapping[str, Callable[[Run], object]] = {
    "save": lambda run: run.save(run.x),
    "save t": lambda run: run.save(run.x.t()),
    "save part": lambda run: run.save(run.x[3:, 1::2]),
    "save window": lambda run: run.save(run.x[5, :7]),
    "save alias": lambda run: run.save(run.alias),
    "save by matmul": lambda run: run.save_again(),
    **{f"save twin {content}": lambda run, content=content: run.save_twin(content) for content in CONTENTS},
}
WRITES: Mapping[str, Callable[[Run], object]] = {
    **{
        f"write {content}": lambda run, content=content: run.x.copy_(CONTENTS[content])
        for content in CONTENTS
    },
    "write window": lambda run: run.x[5, :3].add_(1),
    "write twin": lambda run: [twin.add_(1) for twin in run.kept[-1:]],
}
BLIND_WRITES: Mapping[str, Callable[[Run], object]] = {
    **{
        f"blind {content}": lambda run, content=content: run.alias.copy_(CONTENTS[content])
        for content in CONTENTS
    },
    "blind window": lambda run: run.alias[5, :3].add_(1),
    "blind twin": lambda run: [twin.data.mul_(2) for twin in run.kept[-1:]],
}
OTHERS: Mapping[str, Callable[[Run], object]] = {
    "save unrelated": lambda run: run.kept.append(torch.zeros(3, requires_grad=True).exp()),
    "drop": lambda run: run.drop(),
}
WORDS: Mapping[str, Callable[[Run], object]] = {
    **SAVES,
    **WRITES,
    **BLIND_WRITES,
    **OTHERS,
    "exit": lambda run: None,
}


def draw(number: int, *, blind: bool) -> Sequence[str]:
    """Return the program of this number: up to 7 words inside the context and up to 3 behind it."""
    chance = random.Random(f"{number} {blind}")
    writes = [*WRITES, *(BLIND_WRITES if blind else ())]

    def words(most: int, *, known: Sequence[str]) -> list[str]:
        return [chance.choice(known) for _ in range(chance.randint(1, most))]

    inside = words(3, known=list(SAVES))
    for _ in range(chance.randint(1, 4)):
        inside.append(chance.choice(chance.choice([list(SAVES), writes, list(OTHERS)])))
    start = "start few" if chance.random() < 0.5 else "start many"
    return [start, *inside, "exit", *words(2, known=writes)]


def run(program: Sequence[str], *, around: Around, alone: bool = False) -> list[Outcome]:
    """Run a program and return the outcome of each save; `alone` keeps every write off what was saved."""
    x = CONTENTS[program[0].removeprefix("start ")].clone()
    state = Run(alone, x, x.data)
    stop = program.index("exit")
    with around:
        perform(program[1:stop], state=state)
    perform(program[stop:], state=state)
    return [
        gradient_of(output, weight) if output.requires_grad else Outcome() for output, weight in state.saved
    ]


def perform(words: Sequence[str], *, state: Run) -> None:
    for word in words:
        if word in SAVES or word in OTHERS:
            WORDS[word](state)
        else:
            with torch.no_grad():
                WORDS[word](state)
