"""What a backward gave, bytes or a refusal, and which outcomes Law 4 allows."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from offload import StaleTensorError
from tests.laws.settings import bits


@dataclass(frozen=True)
class Outcome:
    """The bytes of a gradient, or who refused: "torch" or "store"."""

    gradient: bytes = b""
    refused_by: str = ""


def outcome_of(backward: Callable[[], Tensor]) -> Outcome:
    """Run a backward; any error but a refusal is a failure of the test."""
    try:
        return Outcome(gradient=bits(backward()))
    except StaleTensorError:
        return Outcome(refused_by="store")
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return Outcome(refused_by="torch")


def gradient_of(output: Tensor, leaf: Tensor) -> Outcome:
    return outcome_of(lambda: torch.autograd.grad(output.sum(), leaf, retain_graph=True)[0])


def is_allowed(got: Outcome, *, plain: Outcome, right: Outcome, blind: bool) -> bool:
    """Return whether Law 4 allows what was got.

    Always the right gradient; else what the run without hooks gives, be it a refusal or bytes. A refusal of
    the store where plain autograd gives bytes is allowed only when something was written behind PyTorch's
    counter.
    """
    if got.refused_by:
        return bool(plain.refused_by) or (blind and got.refused_by == "store")
    return got in (right, plain)
