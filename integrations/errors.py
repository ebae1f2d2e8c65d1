"""The error that a command ends with: one line, no traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CommandError(Exception):
    """A command cannot do what it was asked; the message is the one line its user sees."""


class InterruptedRunError(CommandError):
    """A run was stopped by a signal and left a checkpoint to resume from.

    Arguments:
        message: what was left and how to go on.
        exit_code: 128 + the signal's number, as shells expect it.
    """

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def told_as_command_error(*kinds: type[Exception]) -> Iterator[None]:
    """Pass on errors that say all there is to say, such as the packages' own, as the command's.

    Arguments:
        kinds: which.
    """
    try:
        yield
    except kinds as error:
        raise CommandError(str(error)) from error
