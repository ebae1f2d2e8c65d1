"""Passes over a large 16-bit weight on a CPU, each as one compiled loop, where there is a compiler.

Whoever calls one has a way in plain operations beside it, which is the reference, and the fallback.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

# Compiling takes seconds, once a process: so many weights are read in a few milliseconds.
_LEAST_COMPILED = 1 << 22

_log = logging.getLogger(__name__)


def is_large(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether compiling is worth it for this weight, which is read in `dtype`."""
    if weight.dtype != dtype or weight.numel() < _LEAST_COMPILED or weight.device.type != "cpu":
        return False
    # Under a mode or a tracer, what is called is to be seen.
    return not torch.compiler.is_compiling() and _get_current_dispatch_mode() is None


class Compiled:
    """A function of tensors that is compiled when it is first run, by weights that are worth it.

    Arguments:
        kernel: writes to one of its arguments; begins with `require_compiled`.
        in_order: on one thread, for a kernel that adds where a key says: several would add atomically, in
            any order and many times slower.
    """

    def __init__(self, kernel: Callable[..., None], *, in_order: bool = False) -> None:
        self._kernel = kernel
        self._in_order = in_order
        self._function: Callable[..., None] | None = None
        self._works = True

    def run(self, *arguments: torch.Tensor) -> bool:
        """Run it, and return whether it ran; not once it failed, most often for want of a compiler."""
        if not self._works:
            return False
        try:
            # Of what a function is compiled anew for, these two may differ from call to call.
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                self._run(*(each.detach() for each in arguments))
        except Exception as error:
            _log.info("%s of large weights is not compiled: %s", self._kernel.__name__, error)
            self._works = False
        return self._works

    def _run(self, *arguments: torch.Tensor) -> None:
        if self._function is not None:
            self._function(*arguments)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about its own
            self._function = self._compiled()
            self._function(*arguments)

    def _compiled(self) -> Callable[..., None]:
        # In this process: a pool of others would outlive what they compile.
        options: dict[str, str | int | bool | Callable[..., object]] = {"compile_threads": 1}
        if self._in_order:
            options |= {"cpp.threads": 1, "cpp.dynamic_threads": False}
        function: Callable[..., None] = torch.compile(self._kernel, dynamic=True, options=options)
        return function


def require_compiled() -> None:
    """Raise where a kernel is run as it stands: all at once it would take several times the memory of the
    weight.
    """
    if not torch.compiler.is_compiling():
        raise RuntimeError("torch.compile is turned off")
