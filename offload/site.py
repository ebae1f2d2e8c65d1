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
        self._ours: dict[CodeType, bool] = {}

    def calling(self) -> str:
        """Return the name of the line that called the operator that is being recorded."""
        frame = sys._getframe(1)  # a thread of the engine or of TorchScript has no frame above ours
        ours = self._ours
        while True:
            skipped = ours.get(frame.f_code)
            if skipped is None:
                skipped = ours[frame.f_code] = frame.f_code.co_filename.startswith(_PACKAGES)
            if not skipped or frame.f_back is None:
                break
            frame = frame.f_back
        key = (frame.f_code, frame.f_lasti)  # a line's number is dear to look up, an instruction's is not
        name = self._names.get(key)
        if name is None:
            path = Path(frame.f_code.co_filename)
            name = self._names[key] = f"{path.parent.name}/{path.name}:{frame.f_lineno}"
        return name
