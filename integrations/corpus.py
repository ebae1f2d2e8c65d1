"""What training reads from: rows of tokens, how an epoch is cut into them, and the order they come in."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from integrations.errors import CommandError


@dataclass(frozen=True)
class Row:
    """One training example.

    Arguments:
        tokens: token ids, [T] int32, special tokens included.
        num_prompt: how many leading tokens carry no loss (the first never does: nothing predicts it).
    """

    tokens: torch.Tensor
    num_prompt: int = 1


class Corpus(ABC):
    """Text that is cut into rows anew for every epoch."""

    @abstractmethod
    def cut(self, phase: float) -> Sequence[Row]:
        """The rows of one epoch; `phase` in [0, 1) says where a text without borders is cut."""

    @abstractmethod
    def hold_out(self, max_rows: int) -> tuple[Corpus, Sequence[Row]]:
        """Part the corpus, always alike, into one to train on and at most `max_rows` rows that never are."""


class RowCorpus(Corpus):
    """Examples that stand for themselves: every epoch has the same ones.

    Arguments:
        rows: the examples.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def cut(self, phase: float) -> Sequence[Row]:
        """All rows, whatever the phase."""
        return self._rows

    def hold_out(self, max_rows: int) -> tuple[Corpus, Sequence[Row]]:
        """Hold out a twentieth of the rows, evenly spaced.

        Raises:
            CommandError: fewer than two rows.
        """
        num_rows = len(self._rows)
        if num_rows < 2:
            raise CommandError(f"the file has {num_rows} row to train on; give at least 2, one is held out")
        num_held = min(max_rows, max(1, num_rows // 20))
        chosen = {(2 * i + 1) * num_rows // (2 * num_held) for i in range(num_held)}
        kept = [row for index, row in enumerate(self._rows) if index not in chosen]
        return RowCorpus(kept), [self._rows[index] for index in sorted(chosen)]


class StreamCorpus(Corpus):
    """One text without borders, cut as the stream protocol does: blocks of context - 1 tokens behind a BOS.

    Arguments:
        tokens: the whole text, [N] int32.
        bos: the token in front of each block.
        context: tokens a row, the BOS included.
    """

    def __init__(self, tokens: torch.Tensor, *, bos: int, context: int) -> None:
        self._tokens = tokens
        self._bos = bos
        self._block = context - 1

    def cut(self, phase: float) -> Sequence[Row]:
        """Blocks with their first border at `phase` of a block: each token is in exactly one of them."""
        first = int(phase * self._block)
        borders = sorted({0, *range(first, len(self._tokens), self._block), len(self._tokens)})
        bos = torch.tensor([self._bos], dtype=torch.int32)
        return [Row(torch.cat([bos, self._tokens[start:end]])) for start, end in itertools.pairwise(borders)]

    def hold_out(self, max_rows: int) -> tuple[Corpus, Sequence[Row]]:
        """Hold out the last twentieth of the text, in whole blocks.

        Raises:
            CommandError: fewer tokens than two blocks.
        """
        num_blocks = len(self._tokens) // self._block
        if num_blocks < 2:
            raise CommandError(
                f"the text has {len(self._tokens)} tokens; give at least {2 * self._block}: "
                f"one block of {self._block} to train on and one to hold out"
            )
        border = len(self._tokens) - self._block * min(max_rows, max(1, num_blocks // 20))
        kept, held = (
            StreamCorpus(part, bos=self._bos, context=self._block + 1)
            for part in (self._tokens[:border], self._tokens[border:])
        )
        return kept, held.cut(0.0)


class Sampler:
    """Batches of a corpus without end: each epoch newly cut and shuffled, the same for the same seed.

    Arguments:
        corpus: where the rows come from.
        batch_size: rows a batch.
        seed: of the cuts and orders.
    """

    def __init__(self, corpus: Corpus, *, batch_size: int, seed: int) -> None:
        self._corpus = corpus
        self._batch_size = batch_size
        self._seed = seed
        self._begin(0)

    def batch(self) -> list[Row]:
        """The next `batch_size` rows; a batch may reach over the end of an epoch."""
        rows: list[Row] = []
        while len(rows) < self._batch_size:
            if self._position == len(self._order):
                self._begin(self._epoch + 1)
            rows.append(self._rows[self._order[self._position]])
            self._position += 1
        return rows

    def state_dict(self) -> dict[str, int]:
        """Where the next batch begins."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where `state` was taken."""
        self._begin(state["epoch"])
        self._position = state["position"]

    def _begin(self, epoch: int) -> None:
        # An own generator: the order must not depend on who else draws random numbers, nor on how often.
        generator = torch.Generator().manual_seed((self._seed << 24) + epoch)
        self._rows = self._corpus.cut(float(torch.rand((), generator=generator)))
        self._order = torch.randperm(len(self._rows), generator=generator).tolist()
        self._epoch, self._position = epoch, 0
