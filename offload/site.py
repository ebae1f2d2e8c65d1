"""By whom a tensor was saved: the innermost line of Python outside torch and this package."""

import os
import sys
from pathlib import Path
from types import CodeType

import torch

_PACKAGES = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parent}{os.sep}")


class Sites:
    """Names calling lines as `folder/file.py:line`, each name made once."""

    def __init__(self) -> None:
        self._names: dict[tuple[CodeType, int], str] = {}
        self._skipped: dict[CodeType, bool] = {}

    def calling(self) -> str:
        """Return the name of the line that called the operator that is being recorded."""
        frame = sys._getframe(1)
        while frame.f_back is not None and self._is_skipped(frame.f_code):
            frame = frame.f_back
        key = (frame.f_code, frame.f_lineno)
        name = self._names.get(key)
        if name is None:
            path = Path(frame.f_code.co_filename)
            name = self._names[key] = f"{path.parent.name}/{path.name}:{frame.f_lineno}"
        return name

    def _is_skipped(self, code: CodeType) -> bool:
        skipped = self._skipped.get(code)
        if skipped is None:
            skipped = self._skipped[code] = code.co_filename.startswith(_PACKAGES)
        return skipped
