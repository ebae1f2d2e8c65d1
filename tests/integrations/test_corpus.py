"""Epochs see every token once, held-out rows are never trained on, and a sampler goes on where it was."""

from collections import Counter

import pytest
import torch

from integrations.corpus import Row, RowCorpus, Sampler, StreamCorpus
from integrations.errors import CommandError


def rows(num_rows: int) -> list[Row]:
    return [Row(torch.tensor([0, index])) for index in range(num_rows)]


def values(chosen: list[Row]) -> list[int]:
    return [int(row.tokens[1]) for row in chosen]


@pytest.mark.parametrize("phase", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("num_tokens", [1, 6, 7, 8, 50])
def test_a_stream_gives_each_token_once(num_tokens: int, phase: float) -> None:
    tokens = torch.arange(1, num_tokens + 1, dtype=torch.int32)
    blocks = StreamCorpus(tokens, bos=0, context=8).cut(phase)
    assert all(row.tokens[0] == 0 and 2 <= len(row.tokens) <= 8 for row in blocks)
    assert torch.equal(torch.cat([row.tokens[1:] for row in blocks]), tokens)


@pytest.mark.parametrize("num_tokens", [14, 20, 21, 7 * 45, 7 * 5000])
def test_the_end_of_a_stream_is_held_out(num_tokens: int) -> None:
    corpus, held = StreamCorpus(torch.arange(num_tokens), bos=-1, context=8).hold_out(64)
    kept = torch.cat([row.tokens[1:] for row in corpus.cut(0.4)])
    assert 1 <= len(held) <= 64
    assert torch.equal(torch.cat([kept, *(row.tokens[1:] for row in held)]), torch.arange(num_tokens))


@pytest.mark.parametrize("num_rows", [2, 3, 19, 20, 41, 5000])
def test_rows_are_held_out_evenly(num_rows: int) -> None:
    corpus, held = RowCorpus(rows(num_rows)).hold_out(64)
    assert len(held) == min(64, max(1, num_rows // 20))
    assert sorted(values(list(corpus.cut(0.0))) + values(list(held))) == list(range(num_rows))


def test_too_little_to_hold_out_is_told() -> None:
    with pytest.raises(CommandError, match="has 1 row to train on; give at least 2"):
        RowCorpus(rows(1)).hold_out(64)
    with pytest.raises(CommandError, match="the text has 13 tokens; give at least 14"):
        StreamCorpus(torch.arange(13), bos=0, context=8).hold_out(64)


def test_an_epoch_has_every_row_once_in_another_order() -> None:
    sampler = Sampler(RowCorpus(rows(10)), batch_size=3, seed=5)
    seen = values([row for _ in range(20) for row in sampler.batch()])
    epochs = [seen[start : start + 10] for start in range(0, 60, 10)]
    assert all(Counter(epoch) == Counter(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_the_order_is_the_seeds_alone() -> None:
    torch.manual_seed(1)
    one = [values(Sampler(RowCorpus(rows(50)), batch_size=8, seed=7).batch()) for _ in range(2)]
    torch.manual_seed(2)
    other = Sampler(RowCorpus(rows(50)), batch_size=8, seed=8).batch()
    assert one[0] == one[1] != values(other)


def test_a_stream_is_cut_elsewhere_in_every_epoch() -> None:
    sampler = Sampler(StreamCorpus(torch.arange(700), bos=-1, context=71), batch_size=1, seed=0)
    starts = {int(row.tokens[1]) % 70 for _ in range(60) for row in sampler.batch()}
    assert len(starts) > 4


def test_a_sampler_goes_on_where_it_was() -> None:
    corpus = StreamCorpus(torch.arange(500), bos=-1, context=17)
    sampler = Sampler(corpus, batch_size=5, seed=3)
    for _ in range(13):
        sampler.batch()
    other = Sampler(corpus, batch_size=5, seed=3)
    other.load_state_dict(sampler.state_dict())
    for _ in range(20):
        pairs = zip(sampler.batch(), other.batch(), strict=True)
        assert all(torch.equal(left.tokens, right.tokens) for left, right in pairs)
