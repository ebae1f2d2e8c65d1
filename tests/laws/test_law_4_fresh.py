"""Law 4, fresh: a write that PyTorch's counter sees is refused where plain autograd does, or harmless."""

import random
from collections import Counter
from collections.abc import Mapping
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from offload import SavedTensorStore, StaleTensorError
from tests.laws.outcomes import Outcome, gradient_of, is_allowed
from tests.laws.savers import SAVERS
from tests.laws.settings import STORES, Around, plain
from tests.laws.writes import SEEN

MOMENTS = ("before the next save", "after the next save", "after the context")
VALUES: Mapping[str, Tensor] = {
    "many": torch.linspace(-2, 2, 64 * 48).view(64, 48),
    "few": torch.tensor([-0.5, 2.0]).repeat(32 * 48).view(64, 48),
    "rows": torch.linspace(-1, 1, 4 * 48).view(4, 48).repeat(16, 1),
}

COMBINATIONS = list(product(SEEN, VALUES, MOMENTS))
NUM_DRAWN = len(COMBINATIONS) // 5  # for each saver and store; together they meet each combination often


def run(saver: str, write: str, *, values: str, moment: str, around: Around, alone: bool = False) -> Outcome:
    """Save, write at the moment, and return what backward gave; `alone` keeps the write off the saved."""
    torch.manual_seed(11)
    other = torch.randn(9, 9, requires_grad=True)
    with around:
        saved = SAVERS[saver](VALUES[values], alone=alone)
        if moment == "after the next save":
            other.sin()
        if moment != "after the context":
            write_to(saved.target, write=write)
            other.exp()
    if moment == "after the context":
        write_to(saved.target, write=write)
    return gradient_of(saved.output, saved.leaf)


def write_to(target: Tensor, *, write: str) -> None:
    with torch.no_grad():
        SEEN[write](target)


@cache
def expected(saver: str, write: str, *, values: str, moment: str) -> tuple[Outcome, Outcome] | None:
    """Return the outcome without hooks and the right one; None where PyTorch refuses the write itself."""
    try:
        got = run(saver, write, values=values, moment=moment, around=plain())
        return got, run(saver, write, values=values, moment=moment, around=plain(), alone=True)
    except RuntimeError:
        return None


@pytest.mark.parametrize("saver", sorted(SAVERS))
def test_a_seen_write_is_refused_or_does_no_harm(saver: str, *, store: SavedTensorStore) -> None:
    breaches = []
    for write, values, moment in random.sample(COMBINATIONS, NUM_DRAWN):
        outcomes = expected(saver, write, values=values, moment=moment)
        if outcomes is None:
            continue
        without, right = outcomes
        got = run(saver, write, values=values, moment=moment, around=store)
        if not is_allowed(got, plain=without, right=right, blind=False):
            breaches.append(f"{write}, {values} values, {moment}: {got.refused_by or 'a third result'}")
    assert not breaches, "\n".join(breaches)
    assert store.stats.held_bytes == 0


def test_the_writes_are_refused_by_plain_autograd() -> None:
    """So that the test above says something: nearly every saver and write ends in PyTorch's own error."""
    refused: Counter[bool] = Counter()
    impossible = []
    for saver in SAVERS:
        for write in SEEN:
            outcomes = expected(saver, write, values="many", moment="after the context")
            if outcomes is None:
                impossible.append((saver, write))
            else:
                refused[outcomes[0].refused_by == "torch"] += 1
    assert refused[True] > 0.9 * refused.total(), refused
    assert len(impossible) <= 40, impossible


@pytest.mark.parametrize("name", [name for name in STORES if "forced" not in name])
def test_a_reference_is_refused_and_encoded_bytes_are_right(name: str) -> None:
    """Which of the two allowed outcomes comes: a store that has bytes of its own gives the right gradient."""
    store = STORES[name]()
    asked = {"write": "add_", "moment": "after the context"}
    _, right = expected("product", values="few", **asked)
    by_reference = run("product", values="many", around=store, **asked)
    encoded = run("product", values="few", around=store, **asked)
    if name in ("copies", "encoded copies"):
        assert by_reference == expected("product", values="many", **asked)[1]
    else:
        assert by_reference == Outcome(refused_by="store")
    assert encoded == (
        right
        if name not in ("at least 4 KiB", "dedupe", "dedupe, whole way")
        else Outcome(refused_by="store")
    )


OPTIMIZERS = {
    "SGD": lambda leaves: torch.optim.SGD(leaves, lr=0.1, foreach=False),
    "SGD foreach": lambda leaves: torch.optim.SGD(leaves, lr=0.1, momentum=0.9, foreach=True),
    "AdamW": lambda leaves: torch.optim.AdamW(leaves, lr=0.1, foreach=False),
    "AdamW foreach": lambda leaves: torch.optim.AdamW(leaves, lr=0.1, foreach=True),
}


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("kind", ["parameter", "leaf", "view of leaf"])
def test_an_optimizer_step_between_forward_and_backward(
    kind: str, *, optimizer: str, store: SavedTensorStore
) -> None:
    def backward(around: Around) -> Tensor:
        torch.manual_seed(2)
        x = torch.randn(64, 32, requires_grad=True)
        leaf = torch.nn.Parameter(torch.randn(32, 32)) if kind == "parameter" else torch.randn(32, 32)
        leaf.requires_grad_()
        with around:
            first, second = (x @ (leaf.t() if "view" in kind else leaf)).exp(), x.square() @ leaf.t()
        first.sum().backward(retain_graph=True)
        OPTIMIZERS[optimizer]([leaf]).step()
        return torch.autograd.grad(second.sum(), x)[0]

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward(plain())
    with pytest.raises(StaleTensorError, match="changed in place after it was saved"):
        backward(store if kind == "parameter" else SavedTensorStore(min_bytes=4096))
    if kind != "parameter":
        try:
            gradient = backward(store)
        except StaleTensorError:
            return
        torch.manual_seed(2)
        x, leaf = torch.randn(64, 32, requires_grad=True), torch.randn(32, 32)
        assert torch.equal(gradient, torch.autograd.grad((x.square() @ leaf.t()).sum(), x)[0])


def test_a_step_after_backward_is_no_matter(store: SavedTensorStore) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 48), torch.nn.GELU(), torch.nn.Linear(48, 3))
    twin = torch.nn.Sequential(torch.nn.Linear(16, 48), torch.nn.GELU(), torch.nn.Linear(48, 3))
    twin.load_state_dict(model.state_dict())
    batches = torch.randn(3, 20, 16)
    for each, around in ((model, store), (twin, plain())):
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.1)
        for batch in batches:
            with around:
                loss = each(batch).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_storage_that_lost_its_bytes_is_refused_not_read() -> None:
    """Read through a kept reference it would be a segmentation fault."""
    x = torch.randn(5000)
    weight = torch.ones(5000, requires_grad=True)
    with SavedTensorStore(min_bytes=4096):
        output = weight * x
    x.untyped_storage().resize_(0)
    with pytest.raises(StaleTensorError, match="its storage has 0 bytes now and had 20000 when it was saved"):
        output.sum().backward()
