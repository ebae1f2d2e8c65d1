"""Lines whose saves are nobody else's are looked at once their operators have returned, and hashed once."""

from typing import Any

import pytest
import torch
from torch import Tensor

from offload import SavedTensorStore, StaleTensorError, digest, settle
from tests.laws.settings import whole_way

NUM_STEPS = 3


@pytest.fixture(params=[False, True], ids=["short way", "whole way"])
def store(request: pytest.FixtureRequest) -> SavedTensorStore:
    store = SavedTensorStore(min_bytes=0)
    return whole_way(store) if request.param else store


@pytest.fixture
def hashes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the hashes that are taken of storages."""
    taken: list[int] = []
    plain = digest.digest_of_storage

    def counted(storage: torch.UntypedStorage) -> bytes:
        taken.append(storage.nbytes())
        return plain(storage)

    monkeypatch.setattr(digest, "digest_of_storage", counted)
    return taken


def products(x: Tensor, *, held: list[Tensor] | None = None, number: int = 0) -> Tensor:
    """Save two equal tensors; with `held` somebody else has the first, too."""
    base = torch.linspace(0.0, 1.0 + number, 64 * 48).view(64, 48)
    first = base.clone()
    if held is not None:
        held.append(first)
    y = x * first
    del first
    return y + x * base.clone()


def learn(store: SavedTensorStore, x: Tensor) -> None:
    for number in range(NUM_STEPS):
        with store:
            y = products(x, number=number)
        y.sum().backward()


def leaf() -> Tensor:
    return torch.ones(64, 48, requires_grad=True)


def test_each_is_hashed_once_and_equal_ones_are_held_once(store: SavedTensorStore, hashes: list[int]) -> None:
    learn(store, leaf())
    hashes.clear()
    x = leaf()
    with store:
        y = products(x)
    stats = store.stats
    assert stats.num_by_stage == {"reference": 1, "content": 1}
    assert stats.held_bytes == 64 * 48 * 4
    assert hashes == [64 * 48 * 4] * 2
    y.sum().backward()
    assert torch.equal(x.grad, 2 * torch.linspace(0.0, 1.0, 64 * 48).view(64, 48))  # type: ignore[arg-type]
    assert store.stats.held_bytes == 0


def test_what_somebody_else_has_stays_a_reference_and_follows(store: SavedTensorStore) -> None:
    learn(store, leaf())
    x, held = leaf(), list[Tensor]()
    with store:
        y = products(x, held=held)
        held[0].data.fill_(3.0)
    held[0].data.fill_(5.0)
    y.sum().backward()
    assert torch.equal(x.grad, 5 + torch.linspace(0.0, 1.0, 64 * 48).view(64, 48))  # type: ignore[arg-type]


def test_what_was_written_before_it_was_let_go_is_what_plain_autograd_reads(store: SavedTensorStore) -> None:
    learn(store, leaf())
    x, held = leaf(), list[Tensor]()
    with store:
        y = products(x, held=held)
        held.pop().data.fill_(3.0)
        assert store.stats.held_bytes == 2 * 64 * 48 * 4
    y.sum().backward()
    assert torch.equal(x.grad, 3 + torch.linspace(0.0, 1.0, 64 * 48).view(64, 48))  # type: ignore[arg-type]


def test_a_write_that_the_counter_sees_is_refused(store: SavedTensorStore) -> None:
    learn(store, leaf())
    x, held = leaf(), list[Tensor]()
    with store:
        y = products(x, held=held)
        held.pop().fill_(3.0)
    with pytest.raises(StaleTensorError, match="at version 1 and was saved at version 0"):
        y.sum().backward()


def test_two_saves_of_one_storage_share_what_becomes_of_it() -> None:
    store = SavedTensorStore(min_bytes=0, uniquify=True)
    for _ in range(20):
        x = leaf()
        with store:
            mask = (torch.rand(64, 48) > 0.5).float()
            wanted = 2 * mask
            y = x * mask + x * mask.view(-1).view(64, 48)
            del mask
        stats = store.stats
        y.sum().backward()
        assert torch.equal(x.grad, wanted)  # type: ignore[arg-type]
        assert store.stats.held_bytes == 0
    assert stats.num_by_stage == {"bits": 1, "storage": 1}
    assert stats.held_bytes == 64 * 48 // 8 + 16


def test_it_can_be_read_before_it_is_looked_at(store: SavedTensorStore) -> None:
    learn(store, leaf())
    x = leaf()
    with store:
        y = products(x)
        y.sum().backward(retain_graph=True)
        saved = y.grad_fn.next_functions[0][0]._saved_other  # type: ignore[union-attr]
        saved.data.fill_(7.0)  # the reader has it, and plain autograd reads what it wrote
    y.sum().backward()
    linear = torch.linspace(0.0, 1.0, 64 * 48).view(64, 48)
    assert torch.equal(x.grad, 2 * linear + (7 + linear))  # type: ignore[arg-type]


def test_an_error_in_forward_leaves_it_by_reference(store: SavedTensorStore) -> None:
    learn(store, leaf())
    x, kept = leaf(), list[Tensor]()

    def fail() -> None:
        with store:
            kept.append(products(x))
            raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        fail()
    assert store.stats.num_by_stage == {"reference": 2}
    assert store.stats.held_bytes == 2 * 64 * 48 * 4
    kept.pop().sum().backward()
    assert torch.equal(x.grad, 2 * torch.linspace(0.0, 1.0, 64 * 48).view(64, 48))  # type: ignore[arg-type]
    assert store.stats.held_bytes == 0


def test_a_reader_on_another_thread_breaks_the_seal(monkeypatch: pytest.MonkeyPatch) -> None:
    """It came while the save was hashed, wrote behind the counter, and let go."""
    store, weight = SavedTensorStore(min_bytes=0), torch.randn(64, 48, requires_grad=True)
    hashed, readers = settle.digest_of, list[Tensor]()
    with store:
        first = weight.sigmoid().sum()
        node = first.grad_fn.next_functions[0][0]  # type: ignore[union-attr]

        def read_meanwhile(source: Tensor) -> bytes:
            digest = hashed(source)
            if not readers:
                readers.append(node._saved_result)  # type: ignore[union-attr]
            return digest

        monkeypatch.setattr(settle, "digest_of", read_meanwhile)
        store.rows()
        readers.pop().data.zero_()
        readers.append(weight)
        second = weight.sigmoid().sum()
    second.backward()
    twin = weight.detach().requires_grad_()
    twin.sigmoid().sum().backward()
    assert torch.equal(weight.grad, twin.grad)  # type: ignore[arg-type]


def test_a_later_save_of_a_late_one_that_somebody_has_joins_it(store: SavedTensorStore) -> None:
    learn(store, leaf())
    x, held = leaf(), list[Tensor]()
    with store:
        y = products(x, held=held)
        assert store.stats.num_by_stage == {"reference": 2}
        z = y + leaf() * held[0] + leaf() * held[0]
    assert store.stats.num_by_stage == {"reference": 2, "storage": 2}
    assert store.stats.held_bytes == 2 * 64 * 48 * 4
    z.sum().backward()
    assert torch.equal(x.grad, 2 * torch.linspace(0.0, 1.0, 64 * 48).view(64, 48))  # type: ignore[arg-type]


def rounded() -> Tensor:
    """Return what the cast codec always wins on, and is equal to nothing else."""
    return torch.randn(64, 48).bfloat16().float()


def test_what_a_codec_always_wins_and_nobody_finds_is_not_hashed(hashes: list[int]) -> None:
    store, num_hashes = SavedTensorStore(min_bytes=0, uniquify=True), list[int]()
    for _ in range(20):
        hashes.clear()
        x, factor = leaf(), rounded()
        wanted = factor.clone()
        with store:
            y = x * factor
            del factor
        assert store.stats.num_by_stage == {"cast": 1}
        y.sum().backward()
        assert torch.equal(x.grad, wanted)  # type: ignore[arg-type]
        assert store.stats.held_bytes == 0
        num_hashes.append(len(hashes))
    # Nobody else's from the ninth on; tried once more at the seventeenth.
    assert num_hashes == [2] * 8 + [1] + [0] * 7 + [1] + [0] * 3


def test_equal_ones_that_come_later_are_found_again() -> None:
    store, stages = SavedTensorStore(min_bytes=0, uniquify=True), list[dict[str, int]]()
    for number in range(80):
        x, first = leaf(), rounded()
        second = first.clone() if number >= 20 else rounded()
        with store:
            y = x * first
            del first
            y = y + x * second
            del second
        stages.append(dict(store.stats.num_by_stage))
        y.sum().backward()
    assert stages[19] == {"cast": 2}
    assert stages[-1] == {"cast": 1, "content": 1}


def test_a_reader_meanwhile_keeps_an_unread_one_by_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    store, encode, readers = SavedTensorStore(min_bytes=0, uniquify=True), settle.encode_best, list[Tensor]()
    nodes: list[Any] = []

    def read_meanwhile(*args: Any, **options: Any) -> Any:
        readers.extend(node._saved_other for node in nodes)
        return encode(*args, **options)

    monkeypatch.setattr(settle, "encode_best", read_meanwhile)
    for number in range(13):
        x, factor = leaf(), rounded()
        with store:
            y = x * factor
            del factor
            if number == 12:
                nodes.append(y.grad_fn)
    assert store.stats.num_by_stage == {"reference": 1}
    readers.pop().data.fill_(3.0)
    y.sum().backward()
    assert x.grad is not None
    assert bool((x.grad == 3).all())  # as plain autograd reads it


@pytest.mark.parametrize("dedupe", [True, False])
def test_what_no_codec_wins_on_is_held_as_on_a_line_where_none_ever_did(dedupe: bool) -> None:
    """On a line whose codec mostly wins, and which is not hashed for that."""
    store, num = SavedTensorStore(uniquify=True, dedupe=dedupe), 1 << 15
    weight, hard = torch.ones(num, requires_grad=True), torch.randn(num)

    def save(value: Tensor) -> Tensor:
        return weight * value.clone()

    for _ in range(24):
        with store:
            easy = save(torch.randint(0, 3, (num,)).float())
        del easy
    with store:
        outs = [save(hard) for _ in range(4)]
    stages = {"reference": 1, "content": 3} if dedupe else {"copy": 4}
    assert store.stats.num_by_stage == stages
    assert store.stats.held_bytes == hard.nbytes * (1 if dedupe else 4)
    sum(outs).sum().backward()  # type: ignore[union-attr]
    assert torch.equal(weight.grad, sum([hard] * 4))  # type: ignore[arg-type]
