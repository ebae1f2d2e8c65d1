"""Output directories: refused when not empty, filled whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from integrations.errors import CommandError

# The file that makes a directory a model directory is moved last.
_MARK = "config.json"


def require_vacant(directory: Path) -> None:
    """Refuse an output directory that has something in it.

    Raises:
        CommandError: it is not empty, or not a directory.
    """
    if directory.exists() and not directory.is_dir():
        raise CommandError(f"cannot write to {directory}: it is a file, not a directory")
    if directory.is_dir() and any(directory.iterdir()):
        raise CommandError(f"{directory} is not empty: name another --output, or remove what is in it")


@contextmanager
def filled_whole(directory: Path) -> Iterator[Path]:
    """A folder to write into, whose files move to `directory` only when all of them are written.

    Arguments:
        directory: made when missing, and removed again when nothing came to lie in it.

    Raises:
        CommandError: writing failed, for instance on a full disk; nothing is left of it.
    """
    partial = directory / ".partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in sorted(partial.iterdir(), key=lambda path: path.name == _MARK):
            path.replace(directory / path.name)
    except (OSError, SafetensorError) as error:
        raise CommandError(f"cannot write {directory}: {' '.join(str(error).split())[:200]}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        remove_if_empty(directory)


@contextmanager
def made_early(directory: Path) -> Iterator[None]:
    """Make an output directory before the long work, so that a wrong place shows at once.

    Arguments:
        directory: removed again when nothing came to lie in it.

    Raises:
        CommandError: it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot make {directory}: {error.strerror}") from error
    try:
        yield
    finally:
        remove_if_empty(directory)


def remove_if_empty(directory: Path) -> None:
    """Remove a directory that nothing came to lie in."""
    with suppress(OSError):  # not empty, or another rank was quicker
        directory.rmdir()


def disk_bytes(directory: Path) -> int:
    """Size of the weight files of a model directory, configuration and tokenizer left out."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def is_palettized(directory: Path) -> bool:
    """Whether `save_palettized` wrote the weights of a directory."""
    return (directory / "palettized.json").is_file()
