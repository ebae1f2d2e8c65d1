"""What the options of the command line take; anything else is told in one line."""

from __future__ import annotations

import argparse
import math

_MAX_NUMBER = 2**32


def positive(text: str) -> int:
    """A whole number from 1."""
    number = natural(text)
    if number == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def bits_or_dense(text: str) -> int | None:
    """A whole number, or None for `dense`."""
    if text == "dense":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number and not `dense`") from None


def at_least_two(text: str) -> int:
    """A whole number from 2."""
    number = natural(text)
    if number < 2:
        raise argparse.ArgumentTypeError("must be at least 2: a BOS and a token")
    return number


def fraction(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return number


def natural(text: str) -> int:
    """A whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    if int(text) >= _MAX_NUMBER:
        raise argparse.ArgumentTypeError(f"must be less than {_MAX_NUMBER}")
    return int(text)
