"""Reading training text: Alpaca json, jsonl with a `text` field, plain text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from integrations.corpus import Corpus, Row, RowCorpus, StreamCorpus
from integrations.errors import CommandError

# The original Stanford Alpaca prompts, byte for byte: models tuned on other words are not comparable.
_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
# Nesting too deep for the parser, and numbers too long for Python, are no json either.
_NOT_JSON = (ValueError, RecursionError)


class Tokenizer(Protocol):
    """What reading asks of a tokenizer."""

    @property
    def bos(self) -> int:
        """The token that begins a text."""

    @property
    def eos(self) -> int:
        """The token that ends a text."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""


@dataclass(frozen=True)
class Reading:
    """What a file held, and what of it cannot be used.

    Arguments:
        corpus: the text.
        num_rows: examples or documents in the file; blocks for a text without separator.
        num_truncated: examples whose end was cut off at the context.
        num_dropped: examples and documents with nothing to learn from inside the context.
    """

    corpus: Corpus
    num_rows: int
    num_truncated: int = 0
    num_dropped: int = 0


def read_training_text(
    path: Path, tokenizer: Tokenizer, *, context: int, separator: str | None = None
) -> Reading:
    """Read a file to train on: Alpaca from `.json`, `text` fields from `.jsonl`, plain text from the rest.

    Arguments:
        path: the file.
        tokenizer: turns text into tokens.
        context: tokens a row, at most.
        separator: what parts the documents of a plain text; without one it is
            cut as the stream protocol cuts it.

    Raises:
        CommandError: the file cannot be read, is empty, or has a row without its fields.
    """
    content = read_utf8(path)
    if not content.strip():
        raise CommandError(f"{path} is empty: there is nothing to train on")
    if separator is not None:
        _require_separator(separator, path, content=content)
    if path.suffix == ".json":
        return _read_instructions(_json_rows(path, content), tokenizer, context=context)
    if path.suffix == ".jsonl":
        texts = [_fields(row, where, ("text",))[0] for where, row in _json_lines(path, content)]
        return _read_documents(texts, tokenizer, context=context)
    if separator is not None:
        return _read_documents(content.strip().split(separator), tokenizer, context=context)
    tokens = torch.tensor(tokenizer.encode([content.strip()])[0], dtype=torch.int32)
    corpus = StreamCorpus(tokens, bos=tokenizer.bos, context=context)
    return Reading(corpus, num_rows=len(corpus.cut(0.0)))


def _require_separator(separator: str, path: Path, *, content: str) -> None:
    if path.suffix in (".json", ".jsonl"):
        raise CommandError(f"--separator parts plain text, and {path} is {path.suffix[1:]}: leave it out")
    if not separator:
        raise CommandError("--separator is empty: name what stands between two documents, or leave it out")
    if separator not in content:
        # A shell hands "\n" on as two characters, for instance.
        raise CommandError(f"--separator: {path} has no {separator!r} in it; for one stream leave it out")


def read_utf8(path: Path) -> str:
    """The text of a file, without a mark of byte order.

    Raises:
        CommandError: there is no such file, or it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CommandError(f"{path} is not UTF-8 text: byte {error.start} is {error.reason}") from error


def _read_instructions(rows: Iterator[tuple[str, Any]], tokenizer: Tokenizer, *, context: int) -> Reading:
    prompts, texts = [], []
    for where, row in rows:
        instruction, given, output = _fields(row, where, ("instruction", "input", "output"))
        template = _PROMPT_WITH_INPUT if given else _PROMPT_WITHOUT_INPUT
        prompts.append(template.format(instruction=instruction, input=given))
        texts.append(prompts[-1] + output)
    lengths = [len(tokens) + 1 for tokens in tokenizer.encode(prompts)]
    kept, num_truncated = [], 0
    for num_prompt, tokens in zip(lengths, tokenizer.encode(texts), strict=True):
        if num_prompt < context:
            num_truncated += len(tokens) + 2 > context
            whole = [tokenizer.bos, *tokens, tokenizer.eos][:context]
            kept.append(Row(torch.tensor(whole, dtype=torch.int32), num_prompt=num_prompt))
    _require_rows(kept, num_rows=len(texts), context=context)
    num_dropped = len(texts) - len(kept)
    return Reading(RowCorpus(kept), len(texts), num_truncated=num_truncated, num_dropped=num_dropped)


def _read_documents(texts: Sequence[str], tokenizer: Tokenizer, *, context: int) -> Reading:
    filled = [text.strip() for text in texts if text.strip()]
    rows: list[Row] = []
    for tokens in tokenizer.encode(filled):
        whole = torch.tensor([*tokens, tokenizer.eos], dtype=torch.int32)
        # A long document goes on in further rows rather than be truncated.
        rows.extend(StreamCorpus(whole, bos=tokenizer.bos, context=context).cut(0.0))
    _require_rows(rows, num_rows=len(texts), context=context)
    return Reading(RowCorpus(rows), len(texts), num_dropped=len(texts) - len(filled))


def _require_rows(rows: Sequence[Row], *, num_rows: int, context: int) -> None:
    if not rows:
        raise CommandError(
            f"none of {num_rows} rows has anything to learn from within {context} tokens: raise --context"
        )


def _json_rows(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(content)
    except _NOT_JSON as error:
        raise CommandError(f"{path} is not json: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise CommandError(f"{path} must hold a json list of rows, not {str(rows)[:40]!r}")
    return ((f"{path} row {index}", row) for index, row in enumerate(rows))


def _json_lines(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    # Not splitlines: a json string may hold U+2028 and the like, at which that ends a line.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path} line {number}", json.loads(line)
            except _NOT_JSON as error:
                raise CommandError(f"{path} line {number} is not json: {error}") from error


def _fields(row: Any, where: str, names: Sequence[str]) -> list[str]:
    if not isinstance(row, dict):
        raise CommandError(f"{where} is {str(row)[:40]!r}, not an object with the fields {', '.join(names)}")
    for name in names:
        if not isinstance(row.get(name), str):
            seen = f"is {type(row[name]).__name__}, not a string" if name in row else "is missing"
            raise CommandError(f"{where}: the field {name!r} {seen}")
        _require_unicode(row[name], f"{where}: the field {name!r}")
    return [row[name] for name in names]


def _require_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise CommandError(f"{where} is no text: {half!r} at {error.start} is half a character") from error
