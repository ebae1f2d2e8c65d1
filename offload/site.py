"""By whom a tensor was saved: the innermost line of Python outside torch and this package."""

import os
import sys
from pathlib import Path
from types import CodeType
from typing import NamedTuple

import torch

_PACKAGES = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parent}{os.sep}")


class Site(NamedTuple):
    """An instruction of somebody's code, and its name as `folder/file.py:line`."""

    name: str
    code: CodeType
    """Kept alive, since it is known by its identity: to hash a code object is to hash its parts."""


class Sites:
    """The calling instructions, each named once."""

    def __init__(self) -> None:
        self._sites: dict[tuple[int, int], Site] = {}
        self.ours: dict[str, bool] = {}
        """By file name, whether its frames are passed over."""

    def calling(self) -> tuple[int, int]:
        """Return the key of the instruction that called the operator that is being recorded."""
        frame = sys._getframe(1)  # a thread of the engine or of TorchScript has no frame above ours
        ours = self.ours
        while True:
            file = frame.f_code.co_filename
            skipped = ours.get(file)
            if skipped is None:
                skipped = ours[file] = file.startswith(_PACKAGES)
            if not skipped or frame.f_back is None:
                break
            frame = frame.f_back
        key = (id(frame.f_code), frame.f_lasti)
        if key not in self._sites:
            path = Path(file)
            self._sites[key] = Site(f"{path.parent.name}/{path.name}:{frame.f_lineno}", frame.f_code)
        return key

    def name(self, key: tuple[int, int]) -> str:
        """Return the name of an instruction."""
        return self._sites[key].name
