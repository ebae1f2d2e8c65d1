"""Law 4, fresh: a write behind PyTorch's counter gives plain autograd's result, the right one or an error."""

import random
from collections.abc import Callable, Mapping
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from offload import SavedTensorStore
from tests.laws.outcomes import Outcome, gradient_of, is_allowed
from tests.laws.savers import SAVERS, Saved
from tests.laws.settings import Around, plain
from tests.laws.test_law_4_fresh import MOMENTS, VALUES
from tests.laws.writes import BLIND

Scene = Callable[..., Outcome]


def run(
    saver: str, write: str, *, values: str, moments: tuple[str, ...], around: Around, alone: bool = False
) -> Outcome:
    """Save, write at each of the moments, and return what backward gave."""
    torch.manual_seed(11)
    other = torch.randn(9, 9, requires_grad=True)
    with around:
        saved = SAVERS[saver](VALUES[values], alone=alone)
        for moment in MOMENTS[:2]:
            if moment in moments:
                write_to(saved.target, write=write)
            other = other.sin()
    if MOMENTS[2] in moments:
        write_to(saved.target, write=write)
    return gradient_of(saved.output, saved.leaf)


def write_to(target: Tensor, *, write: str) -> None:
    with torch.no_grad():
        BLIND[write](target)


@cache
def expected(saver: str, write: str, *, values: str, moments: tuple[str, ...]) -> tuple[Outcome, Outcome]:
    """Return the outcome without hooks and the right one."""
    asked = {"values": values, "moments": moments}
    return run(saver, write, around=plain(), **asked), run(saver, write, around=plain(), alone=True, **asked)


TIMES = [(moment,) for moment in MOMENTS] + [(MOMENTS[0], MOMENTS[2]), (MOMENTS[1], MOMENTS[2]), MOMENTS]
COMBINATIONS = list(product(BLIND, VALUES, TIMES))
NUM_DRAWN = len(COMBINATIONS) // 5  # for each saver and store; together they meet each combination often


@pytest.mark.parametrize("saver", sorted(SAVERS))
def test_a_blind_write_gives_no_third_result(saver: str, *, store: SavedTensorStore) -> None:
    breaches = []
    for write, values, moments in random.sample(COMBINATIONS, NUM_DRAWN):
        without, right = expected(saver, write, values=values, moments=moments)
        got = run(saver, write, values=values, moments=moments, around=store)
        if not is_allowed(got, plain=without, right=right, blind=True):
            breaches.append(f"{write}, {values} values, {moments}: {got.refused_by or 'a third result'}")
    assert not breaches, "\n".join(breaches)
    assert store.stats.held_bytes == 0


def test_plain_autograd_sees_none_of_these_writes() -> None:
    """So that the test above says something: without hooks the gradients are wrong in silence."""
    for write in set(BLIND) - {"data ="}:
        without, right = expected("product", write, values="many", moments=(MOMENTS[2],))
        assert not without.refused_by, write
        assert without != right, write


def run_two(
    savers: tuple[str, str], write: str, *, moments: tuple[str, ...], around: Around, alone: bool = False
) -> Outcome:
    """Save a tensor of few values and one of many, write to both, and return both gradients as one."""
    torch.manual_seed(11)
    other = torch.randn(9, 9, requires_grad=True)
    with around:
        both = [
            SAVERS[saver](VALUES[values], alone=alone)
            for saver, values in zip(savers, ("few", "many"), strict=True)
        ]
        for moment in MOMENTS[:2]:
            if moment in moments:
                write_to_all(both, write=write)
            other = other.sin()
    if MOMENTS[2] in moments:
        write_to_all(both, write=write)
    outcomes = [gradient_of(saved.output, saved.leaf) for saved in both]
    refused = [outcome for outcome in outcomes if outcome.refused_by]
    return refused[0] if refused else Outcome(gradient=b"".join(outcome.gradient for outcome in outcomes))


def write_to_all(both: list[Saved], *, write: str) -> None:
    for saved in both:
        write_to(saved.target, write=write)


PAIRS = list(product(product(sorted(SAVERS), repeat=2), sorted(BLIND), TIMES))


@pytest.mark.parametrize("part", range(3))
def test_a_gradient_of_two_blindly_written_tensors_is_no_third_one(
    part: int, *, store: SavedTensorStore
) -> None:
    breaches = []
    for savers, write, moments in random.sample(PAIRS, 60):
        without, right = (
            run_two(savers, write, moments=moments, around=plain(), alone=alone) for alone in (False, True)
        )
        got = run_two(savers, write, moments=moments, around=store)
        if not is_allowed(got, plain=without, right=right, blind=True):
            breaches.append(f"{savers}, {write}, {moments}: {got.refused_by or 'a third result'}")
    assert not breaches, f"in part {part}: " + "\n".join(breaches)


def fused_optimizer(around: Around, *, alone: bool, values: Tensor) -> Outcome:
    x, leaf = torch.randn(64, 64, requires_grad=True), values.clone().requires_grad_()
    with around:
        first = (x @ leaf).sum()
        second = x @ (leaf.detach().clone() if alone else leaf)
    first.backward()
    torch.optim.Adam([leaf], lr=0.1, fused=True).step()
    return gradient_of(second, x)


def fused_optimizer_of_parameters(around: Around, *, alone: bool, values: Tensor) -> Outcome:
    model, x = nn.Linear(64, 64), torch.randn(32, 64, requires_grad=True)
    with torch.no_grad():
        model.weight.copy_(values)
    twin = nn.Linear(64, 64)
    twin.load_state_dict(model.state_dict())
    with around:
        first, second = model(x).sum(), (twin if alone else model)(x)
    first.backward()
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()
    return gradient_of(second, x)


def batch_norm_statistics(around: Around, *, alone: bool, values: Tensor) -> Outcome:
    norm = nn.BatchNorm1d(values.numel())
    x = torch.randn(5, values.numel(), requires_grad=True)
    with torch.no_grad():
        norm.running_var.copy_(values.flatten().abs() + 1)
    twin = nn.BatchNorm1d(values.numel())
    twin.load_state_dict(norm.state_dict())
    norm.eval(), twin.eval()
    with around:
        first = (twin if alone else norm)(x)
        norm.train()
        norm(x * 3)
    return gradient_of(first, x)


def noise_of_rrelu(around: Around, *, alone: bool, values: Tensor) -> Outcome:
    """One noise buffer serves two calls: the second fills it again, and its counter does not see that."""
    x, noise = torch.randn(64, 64, requires_grad=True), values.clone()
    with around:
        first = torch._C._nn.rrelu_with_noise(x, noise, 0.1, 0.3, True)
        torch._C._nn.rrelu_with_noise(x * 2, noise.clone() if alone else noise, 0.1, 0.3, True)
    return gradient_of(first, x)


SCENES: Mapping[str, Scene] = {
    scene.__name__: scene
    for scene in (fused_optimizer, fused_optimizer_of_parameters, batch_norm_statistics, noise_of_rrelu)
}


@pytest.mark.parametrize("values", ["few", "many"])
@pytest.mark.parametrize("name", sorted(SCENES))
def test_what_training_writes_gives_no_third_result(
    name: str, *, values: str, store: SavedTensorStore
) -> None:
    contents = torch.randn(64, 64)
    contents = contents.sign() if values == "few" else contents

    def perform(around: Around, *, alone: bool = False) -> Outcome:
        torch.manual_seed(4)
        return SCENES[name](around, alone=alone, values=contents)

    without, right = perform(plain()), perform(plain(), alone=True)
    assert is_allowed(perform(store), plain=without, right=right, blind=True)
