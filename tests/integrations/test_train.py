"""A step is what plain autograd and AdamW make of it, and the loop can be stopped between two."""

import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from edkm import Clustering
from integrations.checkpoint import Checkpoints
from integrations.corpus import Row, RowCorpus, Sampler
from integrations.errors import CommandError, InterruptedRunError
from integrations.parallel import Replicated
from integrations.ranks import Ranks
from integrations.train import Schedule, Training, train
from integrations.transformers import load_dense

NUM_STEPS = 4


def corpus(num_rows: int = 30) -> RowCorpus:
    generator = torch.Generator().manual_seed(3)
    lengths = [5 + index % 20 for index in range(num_rows)]
    return RowCorpus([Row(torch.randint(258, (length,), generator=generator)) for length in lengths])


def training(model: Path, *, batch_size: int = 4, num_accumulated: int = 1) -> tuple[nn.Module, Training]:
    loaded = load_dense(str(model), dtype=torch.float32)
    return loaded, Training(
        loaded,
        Clustering(loaded, {}),
        sampler=Sampler(corpus(), batch_size=batch_size, seed=0),
        schedule=Schedule(NUM_STEPS, learning_rate=0.01, num_accumulated=num_accumulated),
        parallel=Replicated(loaded, ranks=Ranks()),
    )


def weights(model: nn.Module) -> Sequence[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def checkpoints(directory: Path) -> Checkpoints:
    return Checkpoints(directory, settings={}, num_kept=2, ranks=Ranks())


def test_accumulated_batches_are_one_large_batch(tiny_model: Path) -> None:
    """Although their rows differ in length: each token counts the same."""
    (one, large), (other, small) = (
        training(tiny_model, batch_size=8),
        training(tiny_model, batch_size=2, num_accumulated=4),
    )
    for _ in range(3):
        losses = large.step().loss, small.step().loss
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for left, right in zip(weights(one), weights(other), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)


def test_a_step_reports_what_the_store_did(tiny_model: Path) -> None:
    record = training(tiny_model)[1].step()
    assert 0 < record.peak_held_bytes <= record.saved_bytes


def test_the_loss_falls(tiny_model: Path) -> None:
    _, run = training(tiny_model)
    rows = corpus().cut(0.0)
    before = run.held_out_losses(rows)
    for _ in range(NUM_STEPS):
        run.step()
    after = run.held_out_losses(rows)
    assert after["soft"] == after["snapped"] < before["soft"]


def test_a_loss_that_is_not_finite_stops_before_the_weights_move(tiny_model: Path) -> None:
    model, run = training(tiny_model)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = float("inf")
    before = weights(model)[1:]
    with pytest.raises(CommandError, match="the loss is nan at step 1: lower --learning-rate"):
        run.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model)[1:], strict=True))


def test_the_loop_shows_loss_memory_and_time(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    notes: dict[str, int] = {}
    _, run = training(tiny_model)
    train(run, num_steps=NUM_STEPS, checkpoints=checkpoints(tmp_path), interval=0, notes=notes)
    shown = capfd.readouterr().err
    assert "4/4" in shown
    assert "loss " in shown
    assert "held " in shown
    assert "<00:" in shown
    assert notes["saved_bytes"] >= notes["peak_held_bytes"] > 0
    assert not list(tmp_path.iterdir())


def test_checkpoints_come_at_the_interval_and_at_the_end(tiny_model: Path, tmp_path: Path) -> None:
    train(
        training(tiny_model)[1], num_steps=NUM_STEPS, checkpoints=checkpoints(tmp_path), interval=3, notes={}
    )
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000003", "step-00000004"]


class Interrupting:
    """Dense weights that are interrupted in the midst of a step."""

    def __init__(self, inner: Clustering, *, at: int, number: signal.Signals) -> None:
        self._inner, self._left, self._number = inner, at, number
        self.parameter_groups = inner.parameter_groups
        self.clip_grad_norm_ = inner.clip_grad_norm_
        self.soft, self.snapped = inner.soft, inner.snapped
        self.num_dead_centroids = inner.num_dead_centroids

    def step(self) -> None:
        self._left -= 1
        if self._left == 0:
            signal.raise_signal(self._number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    number: signal.Signals, tiny_model: Path, tmp_path: Path
) -> None:
    unbroken, run = training(tiny_model)
    train(run, num_steps=NUM_STEPS, checkpoints=checkpoints(tmp_path / "a"), interval=0, notes={})

    model, _ = training(tiny_model)
    interrupted = Training(
        model,
        Interrupting(Clustering(model, {}), at=2, number=number),
        sampler=Sampler(corpus(), batch_size=4, seed=0),
        schedule=Schedule(NUM_STEPS, learning_rate=0.01),
        parallel=Replicated(model, ranks=Ranks()),
    )
    handler = signal.getsignal(number)
    with pytest.raises(
        InterruptedRunError, match=r"after step 2 of 4, checkpoint in .*--resume goes on"
    ) as caught:
        train(interrupted, num_steps=NUM_STEPS, checkpoints=checkpoints(tmp_path / "b"), interval=0, notes={})
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) is handler

    resumed, run = training(tiny_model)
    state = checkpoints(tmp_path / "b").load(run.state_dict())
    assert state is not None
    run.load_state_dict(state)
    train(run, num_steps=NUM_STEPS, checkpoints=checkpoints(tmp_path / "b"), interval=0, notes={})
    assert all(torch.equal(a, b) for a, b in zip(weights(unbroken), weights(resumed), strict=True))


def test_a_second_signal_does_not_wait(tiny_model: Path, tmp_path: Path) -> None:
    model, run = training(tiny_model)
    handle = model.register_forward_hook(lambda *_: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        train(run, num_steps=NUM_STEPS, checkpoints=checkpoints(tmp_path), interval=0, notes={})
    handle.remove()
    assert not list(tmp_path.iterdir())
