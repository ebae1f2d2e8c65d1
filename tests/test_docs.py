"""What the pages show works: Python blocks run, commands exist and parse, named files are there."""

import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^\s*```(\w*)\s*$")
LANGUAGES = {"python", "sh", "console", "json", "toml", "text"}
NAMED_FILE = re.compile(
    r"`((?:offload|edkm|integrations|tests|bench|docs)/[\w./-]*|Makefile|\.ci/run)(?:::(\w+))?`"
)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
ASSIGNMENT = re.compile(r"^[A-Z_]+=")


@dataclass(frozen=True)
class Block:
    """One fenced block: its page, the line it starts on, its language and its text."""

    page: Path
    line: int
    language: str
    source: str

    @property
    def where(self) -> str:
        """Return page and line, as an editor opens them."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page in order."""
    opened: tuple[int, str] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = FENCE.match(line)
        if opened is None and fence:
            opened, lines = (number + 1, fence.group(1)), []
        elif opened is not None and line.strip() == "```":
            yield Block(page, *opened, source="\n".join(lines) + "\n")
            opened = None
        else:
            lines.append(line)
    assert opened is None, f"{page}: the block that opens before line {opened} never ends"


BLOCKS = [block for page in PAGES for block in blocks(page)]


def commands(block: Block) -> Iterator[list[str]]:
    """Yield the words of each command a shell block shows, without its settings of the environment."""
    source = block.source
    if block.language == "console":
        source = "\n".join(line[2:] for line in source.splitlines() if line.startswith("$ "))
    for line in source.replace("\\\n", " ").splitlines():
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            while words and ASSIGNMENT.match(words[0]):
                words = words[1:]
            if words:
                yield words


def check_command(words: list[str]) -> None:
    """Fail unless the command could be typed as it stands."""
    name, *rest = words
    if name in {"python", "torchrun"} and "-m" in rest:
        module, *arguments = rest[rest.index("-m") + 1 :]
        check_module(module, arguments)
    elif name == "edkm":
        parse(rest)
    elif name == "make":
        targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in rest if "=" not in word} <= targets
    elif name == "pytest":
        check_module(name, rest)
    elif name == "bash":
        assert (ROOT / rest[0]).is_file()
    else:
        assert [name, *rest][:2] in (["git", "clone"], ["cd", *rest[:1]], ["pip", "install"]), (
            "unknown command"
        )


def parse(arguments: list[str]) -> None:
    """Run the command line's own parser, and nothing behind it; exits where that does."""
    from integrations.commands import _parser

    _parser().parse_args(arguments)


def check_module(module: str, arguments: list[str]) -> None:
    """Fail unless `python -m module arguments` could be typed."""
    if module == "edkm":
        parse(arguments)
    elif module == "pytest":
        paths = [word.partition("::")[0] for word in arguments if not word.startswith("-")]
        assert all((ROOT / path).exists() for path in paths), paths
    else:
        assert module.startswith("bench."), f"{module} is not ours"
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


def test_every_block_says_what_it_is() -> None:
    unknown = [block.where for block in BLOCKS if block.language not in LANGUAGES]
    assert not unknown, f"name one of {sorted(LANGUAGES)}: {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, *, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run in order, in one namespace and in an empty folder."""
    namespace = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", namespace)
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        if block.language == "python":
            source = "\n" * (block.line - 1) + block.source
            exec(compile(source, str(page), "exec"), vars(namespace))


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language in {"sh", "console"}], ids=lambda block: block.where
)
def test_commands_exist_and_parse(block: Block) -> None:
    for words in commands(block):
        try:
            check_command(words)
        except SystemExit as stopped:  # --help stops with 0
            if stopped.code:
                pytest.fail(f"{block.where}: the parser refuses {shlex.join(words)}")


def test_the_command_check_sees_a_wrong_command() -> None:
    for wrong in ("make nothing", "edkm finetune --no-such-option", "python -m bench.nothing", "rm -rf x"):
        with pytest.raises((AssertionError, SystemExit)):
            check_command(shlex.split(wrong))


def test_json_and_toml_blocks_parse() -> None:
    for block in BLOCKS:
        if block.language == "json":
            json.loads(block.source)
        elif block.language == "toml":
            tomllib.loads(block.source)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_and_links_are_there(page: Path) -> None:
    text = page.read_text()
    missing = [name for name, _ in NAMED_FILE.findall(text) if not (ROOT / name).exists()]
    missing += [
        link for link in LINK.findall(text) if "://" not in link and not (page.parent / link).exists()
    ]
    assert not missing, f"{page.name}: {missing}"
    for name, function in NAMED_FILE.findall(text):
        if function:
            assert re.search(rf"\b(def|class) {function}\b", (ROOT / name).read_text()), f"{name}::{function}"
