"""The training loop: clustered and dense models alike, interruptible between two steps."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn, Protocol

from torch import nn
from tqdm import tqdm

from integrations.checkpoint import Checkpoints
from integrations.corpus import Row, Sampler
from integrations.errors import CommandError, InterruptedRunError
from integrations.evaluate import held_out_loss
from integrations.loss import Loss, num_targets, summed_loss
from integrations.optimizer import MasterAdamW, cosine_factor
from integrations.parallel import Parallel
from integrations.ranks import Ranks
from offload import SavedTensorStore

_MAX_NORM = 1.0
_WARMUP = 0.05


class Weights(Protocol):
    """The weights that are trained: an `edkm.Clustering`, of none where a dense control is trained."""

    def parameter_groups(self, learning_rate: float, *, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """AdamW groups; the learning rate is a fraction of each weight's rms."""

    def clip_grad_norm_(self, max_norm: float) -> object:
        """Bound the gradient, measured in units of each weight's rms."""

    def step(self) -> None:
        """Follow an optimizer step."""

    def soft(self) -> AbstractContextManager[Any]:
        """Run on the weights that training sees."""

    def snapped(self) -> AbstractContextManager[Any]:
        """Run on the weights that will be written."""

    def num_dead_centroids(self) -> dict[str, int]:
        """Centroids that no weight is nearest to, by weight."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Arguments:
        num_steps: optimizer steps.
        learning_rate: at its peak, as a fraction of each weight's rms a step.
        num_accumulated: batches a step.
    """

    num_steps: int
    learning_rate: float
    num_accumulated: int = 1

    def factor(self, num_done: int) -> float:
        """Return the learning rate of the step after `num_done`, over its peak: warm-up, then cosine."""
        warmup_steps = math.ceil(_WARMUP * self.num_steps)
        return cosine_factor(num_done, num_steps=self.num_steps, warmup_steps=warmup_steps)


@dataclass(frozen=True)
class StepRecord:
    """What one step did.

    Arguments:
        loss: mean loss of a token, in nats.
        saved_bytes: what autograd asked to keep for one batch.
        peak_held_bytes: what the store held for it, at most.
    """

    loss: float
    saved_bytes: int
    peak_held_bytes: int


class Training:
    """A model, the batches it sees and the optimizer that moves it; owns the optimizer's memory.

    Arguments:
        model: a causal language model, in training mode from here on.
        weights: what of it is trained.
        sampler: where the batches come from.
        schedule: how long and how fast.
        parallel: the model on its ranks; every rank has the same sampler.
        loss: what to make small.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Weights,
        *,
        sampler: Sampler,
        schedule: Schedule,
        parallel: Parallel,
        loss: Loss = summed_loss,
    ) -> None:
        self.ranks = parallel.ranks
        self._loss = loss
        self._parallel = parallel
        self._model = model
        self._weights = weights
        self._sampler = sampler
        self._schedule = schedule
        self._optimizer = MasterAdamW(weights.parameter_groups(schedule.learning_rate))
        self._store = SavedTensorStore(uniquify=True, shard=True)
        self.num_done = 0

    def step(self) -> StepRecord:
        """Take one optimizer step.

        Raises:
            CommandError: the loss is not finite; the weights are as they were before.
        """
        batches = [self._sampler.batch() for _ in range(self._schedule.num_accumulated)]
        num_tokens = max(1, sum(num_targets(batch) for batch in batches))
        self._model.train()
        records = [
            self._backward(batch, num_tokens=num_tokens, is_last=batch is batches[-1]) for batch in batches
        ]
        self._parallel.finish()
        loss = self.ranks.sum(sum(record.loss for record in records))
        if not math.isfinite(loss):
            raise CommandError(f"the loss is {loss} at step {self.num_done + 1}: lower --learning-rate")
        self._weights.clip_grad_norm_(_MAX_NORM)
        self._optimizer.step(self._schedule.factor(self.num_done))
        self._weights.step()
        self.num_done += 1
        return StepRecord(
            loss=loss,
            saved_bytes=max(record.saved_bytes for record in records),
            peak_held_bytes=max(record.peak_held_bytes for record in records),
        )

    def held_out_losses(self, rows: Sequence[Row]) -> dict[str, float]:
        """Mean loss of a token on the weights that training sees, and on those that will be written."""
        with self._weights.soft():
            soft = held_out_loss(self._model, rows)
        with self._weights.snapped():
            return {"soft": soft, "snapped": held_out_loss(self._model, rows)}

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on to the same bits, on any number of ranks.

        Its tensors are the run's own, as far as this rank holds them; tied ones are in it once.
        """
        tensors = {id(each): (name, each) for name, each in self._model.state_dict(keep_vars=True).items()}
        return {
            "num_done": self.num_done,
            "sampler": self._sampler.state_dict(),
            **{f"model.{name}": tensor.detach() for name, tensor in tensors.values()},
            **{f"optimizer.{name}": value for name, value in self._optimizer.state_dict().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; its tensors are in their places already."""
        # No more than to tell the modules that their tensors changed: some keep what they computed of them.
        self._model.load_state_dict({}, strict=False)
        self._optimizer.load_state_dict({"peaks": state["optimizer.peaks"]})
        self._sampler.load_state_dict(state["sampler"])
        self.num_done = state["num_done"]

    def _backward(self, batch: Sequence[Row], *, num_tokens: int, is_last: bool) -> StepRecord:
        rows, weight = self.ranks.share_of(batch)
        with self._store as store:
            with self._parallel.computing():
                loss = self._loss(self._model, rows) * weight / num_tokens
            self._parallel.backward(loss, is_last=is_last)
        stats = store.stats
        return StepRecord(float(loss.detach()), stats.saved_bytes, stats.peak_held_bytes)


def train(
    training: Training, *, num_steps: int, checkpoints: Checkpoints, interval: int, notes: dict[str, Any]
) -> None:
    """Train up to `num_steps`, with a progress bar on stderr.

    Arguments:
        training: what to step.
        num_steps: of the whole run.
        checkpoints: where to write them.
        interval: steps between two checkpoints; 0 writes one only when interrupted.
        notes: written into each checkpoint beside the training's state; the largest step is noted in it.

    Raises:
        InterruptedRunError: Ctrl-C or SIGTERM came, here or on another rank; the step was finished and a
            checkpoint written. Where there are other ranks, further signals are ignored from then on.
    """
    ranks = training.ranks
    with _signals(ranks) as seen, _bar(num_steps, training.num_done, is_shown=ranks.is_first) as bar:
        while True:
            if signalled := ranks.largest(seen[0] if seen else 0):
                checkpoints.save({**training.state_dict(), "notes": notes}, step=training.num_done)
                raise InterruptedRunError(
                    f"interrupted after step {training.num_done} of {num_steps}, checkpoint in "
                    f"{checkpoints.directory}: the same command with --resume goes on",
                    exit_code=128 + signalled,
                )
            if training.num_done >= num_steps:
                return
            record = training.step()
            for name in ("saved_bytes", "peak_held_bytes"):
                notes[name] = max(notes.get(name, 0), getattr(record, name))
            bar.set_postfix_str(
                f"loss {record.loss:.3f}, held {record.peak_held_bytes / 2**20:.1f} "
                f"of {record.saved_bytes / 2**20:.1f} MiB",
                refresh=False,
            )
            bar.update()
            if interval and (training.num_done % interval == 0 or training.num_done == num_steps):
                checkpoints.save({**training.state_dict(), "notes": notes}, step=training.num_done)


def _bar(num_steps: int, num_done: int, *, is_shown: bool) -> tqdm[NoReturn]:
    return tqdm(
        total=num_steps,
        initial=num_done,
        unit="step",
        mininterval=0.5,
        file=sys.stderr,
        disable=not is_shown,
    )


@contextmanager
def _signals(ranks: Ranks) -> Iterator[list[int]]:
    seen: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    except InterruptedRunError:
        if ranks.num_ranks > 1:
            # All ranks stop for the signal of the first that got one. One's own may be late, and who started
            # them sends another when it sees the first rank end: this one would be gone before it said why.
            previous = dict.fromkeys(previous, signal.SIG_IGN)
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
