"""Every format is read as its makers meant it, and no row is lost or cut in silence."""

import json
from pathlib import Path

import pytest
import torch

from integrations.corpus import RowCorpus, StreamCorpus
from integrations.errors import CommandError
from integrations.text import Reading, read_training_text
from integrations.transformers import HubTokenizer

WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nSay hello.\n\n### Response:"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd {both}.\n\n"
    "### Input:\n1, 2\n\n### Response:"
)
HELLO = {"instruction": "Say hello.", "input": "", "output": "Hello!"}
SUM = {"instruction": "Add {both}.", "input": "1, 2", "output": "3"}


def read(
    content: object, path: Path, tokenizer: HubTokenizer, *, context: int = 1000, separator: str | None = None
) -> Reading:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return read_training_text(path, tokenizer, context=context, separator=separator)


def ids(text: str, tokenizer: HubTokenizer) -> list[int]:
    return tokenizer.encode([text])[0]


@pytest.mark.parametrize(("row", "prompt"), [(HELLO, WITHOUT_INPUT), (SUM, WITH_INPUT)])
def test_an_instruction_is_the_original_prompt_and_only_its_answer_is_learned(
    row: dict[str, str], prompt: str, tmp_path: Path, tokenizer: HubTokenizer
) -> None:
    [read_row] = read([row], tmp_path / "a.json", tokenizer).corpus.cut(0.0)
    expected = [tokenizer.bos, *ids(prompt + row["output"], tokenizer), tokenizer.eos]
    assert read_row.tokens.tolist() == expected
    learned = read_row.tokens[read_row.num_prompt :].tolist()
    assert learned == [*ids(row["output"], tokenizer), tokenizer.eos]


def test_truncated_and_dropped_instructions_are_counted(tmp_path: Path, tokenizer: HubTokenizer) -> None:
    long = {**HELLO, "output": "x" * 500}
    too_long = {**HELLO, "instruction": "y" * 500}
    reading = read([HELLO, long, too_long, SUM], tmp_path / "a.json", tokenizer, context=300)
    assert (reading.num_rows, reading.num_truncated, reading.num_dropped) == (4, 1, 1)
    assert [len(row.tokens) for row in reading.corpus.cut(0.0)][1] == 300


def test_a_row_that_just_fits_is_not_truncated(tmp_path: Path, tokenizer: HubTokenizer) -> None:
    length = len(ids(WITHOUT_INPUT + "Hello!", tokenizer)) + 2
    assert read([HELLO], tmp_path / "a.json", tokenizer, context=length).num_truncated == 0
    assert read([HELLO], tmp_path / "b.json", tokenizer, context=length - 1).num_truncated == 1


def test_lines_with_text_go_on_in_further_rows(tmp_path: Path, tokenizer: HubTokenizer) -> None:
    lines = '{"text": "abcdefgh"}\n\n{"text": "xy", "more": 1}\n{"text": "  "}\n'
    reading = read(lines, tmp_path / "a.jsonl", tokenizer, context=6)
    rows = [row.tokens.tolist() for row in reading.corpus.cut(0.3)]
    bos, eos = tokenizer.bos, tokenizer.eos
    assert rows == [
        [bos, *ids("abcde", tokenizer)],
        [bos, *ids("fgh", tokenizer), eos],
        [bos, *ids("xy", tokenizer), eos],
    ]
    assert (reading.num_rows, reading.num_truncated, reading.num_dropped) == (3, 0, 1)


def test_a_separator_parts_documents(tmp_path: Path, tokenizer: HubTokenizer) -> None:
    reading = read("one\n<|end|>\ntwo\n<|end|>\n", tmp_path / "a.txt", tokenizer, separator="<|end|>")
    rows = [row.tokens.tolist() for row in reading.corpus.cut(0.0)]
    assert rows == [[tokenizer.bos, *ids(word, tokenizer), tokenizer.eos] for word in ("one", "two")]
    assert isinstance(reading.corpus, RowCorpus)


def test_text_without_a_separator_is_cut_as_the_stream_protocol_cuts(
    tmp_path: Path, tokenizer: HubTokenizer
) -> None:
    content = "Ünicode and\nlines " * 9
    reading = read(f"\n {content}\n", tmp_path / "a.txt", tokenizer, context=8)
    assert isinstance(reading.corpus, StreamCorpus)
    rows = reading.corpus.cut(0.0)
    stream = ids(content.strip(), tokenizer)
    assert [row.tokens.tolist() for row in rows] == [
        [tokenizer.bos, *stream[start : start + 7]] for start in range(0, len(stream), 7)
    ]
    assert reading.num_rows == len(rows)
    assert all(row.num_prompt == 1 and row.tokens.dtype == torch.int32 for row in rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "is empty: there is nothing to train on"),
        ("a.json", " \n", "is empty"),
        ("a.json", "[]", "must hold a json list of rows, not '[]'"),
        ("a.json", '{"rows": 1}', "must hold a json list of rows"),
        ("a.json", "[{]", "is not json: "),
        ("a.json", [HELLO, {"instruction": "x", "input": ""}], "row 1: the field 'output' is missing"),
        ("a.json", [{**HELLO, "input": 7}], "row 0: the field 'input' is int, not a string"),
        ("a.json", ["hello"], "row 0 is 'hello', not an object with the fields instruction, input, output"),
        ("a.jsonl", '{"text": "a"}\n{"body": "b"}', "line 2: the field 'text' is missing"),
        ("a.jsonl", '{"text": "a"}\n{"text"', "line 2 is not json: "),
        ("a.jsonl", '{"text": ""}', "none of 1 rows has anything to learn from within 1000 tokens"),
        ("a.json", "[" * 100_000, "is not json: "),
        ("a.json", "[" + "9" * 5000 + "]", "is not json: "),
        ("a.jsonl", '{"text": "a"}\n' + "[" * 100_000, "line 2 is not json: "),
        ("a.jsonl", r'{"text": "a\ud800b"}', "line 1: the field 'text' is no text: '\\ud800' at 1 is half"),
    ],
)
def test_bad_content_is_told(
    name: str, content: object, message: str, tmp_path: Path, tokenizer: HubTokenizer
) -> None:
    with pytest.raises(CommandError) as caught:
        read(content, tmp_path / name, tokenizer)
    assert message in str(caught.value)
    assert name in str(caught.value) or "none of" in str(caught.value)


def test_all_rows_too_long_is_told(tmp_path: Path, tokenizer: HubTokenizer) -> None:
    with pytest.raises(CommandError, match="within 50 tokens: raise --context"):
        read([HELLO], tmp_path / "a.json", tokenizer, context=50)


def test_a_separator_for_json_is_refused(tmp_path: Path, tokenizer: HubTokenizer) -> None:
    with pytest.raises(CommandError, match="--separator parts plain text"):
        read([HELLO], tmp_path / "a.json", tokenizer, separator="x")


def test_a_separator_that_parts_nothing_is_refused(tmp_path: Path, tokenizer: HubTokenizer) -> None:
    with pytest.raises(CommandError, match=r"a\.txt has no '\\\\n---' in it"):
        read("one\n---\ntwo", tmp_path / "a.txt", tokenizer, separator="\\n---")
    with pytest.raises(CommandError, match="--separator is empty"):
        read("one\ntwo", tmp_path / "a.txt", tokenizer, separator="")


def test_a_mark_of_byte_order_is_no_text(tmp_path: Path, tokenizer: HubTokenizer) -> None:
    for name, content in [
        ("a.json", json.dumps([HELLO])),
        ("a.jsonl", '{"text": "abc"}'),
        ("a.txt", "some text"),
    ]:
        plain = read(content, tmp_path / name, tokenizer, context=200)
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())
        marked = read_training_text(tmp_path / name, tokenizer, context=200)
        rows = [[row.tokens.tolist() for row in reading.corpus.cut(0.0)] for reading in (plain, marked)]
        assert rows[0] == rows[1]


def test_a_line_of_json_ends_at_a_line_feed_alone(tmp_path: Path, tokenizer: HubTokenizer) -> None:
    """json allows the other characters at which Python ends a line inside of a string."""
    text = "one\u2028two\x85three\u2029four"
    reading = read(json.dumps({"text": text}, ensure_ascii=False), tmp_path / "a.jsonl", tokenizer)
    assert reading.num_rows == 1
    assert reading.corpus.cut(0.0)[0].tokens.tolist() == [tokenizer.bos, *ids(text, tokenizer), tokenizer.eos]


def test_unreadable_files_are_told(tmp_path: Path, tokenizer: HubTokenizer) -> None:
    with pytest.raises(CommandError, match=r"cannot read .*none\.txt: No such file"):
        read_training_text(tmp_path / "none.txt", tokenizer, context=8)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(CommandError, match="is not UTF-8 text: byte 3"):
        read_training_text(tmp_path / "latin.txt", tokenizer, context=8)
