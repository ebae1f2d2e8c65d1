"""Checkpoints on disk: complete or not there, the last one marked, read back without pickle's code."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from integrations.errors import CommandError

_LAST = "last.json"
_SETTINGS = "settings.json"
_STATE = "state.pt"
_PARTIAL = ".partial-"


class Checkpoints:
    """The checkpoints of one run, in one directory.

    Arguments:
        directory: made with the first checkpoint.
        settings: what the run was asked for, by option; a run with others cannot resume.
        num_kept: how many of the latest stay.
    """

    def __init__(self, directory: Path, *, settings: Mapping[str, Any], num_kept: int) -> None:
        self.directory = directory
        self._settings = dict(settings)
        self._num_kept = num_kept

    def save(self, state: Mapping[str, Any], *, step: int) -> Path:
        """Write a checkpoint, mark it as the last, and remove those beyond the number kept.

        Arguments:
            state: nested dicts and lists of tensors, numbers and strings; the random states are added.
            step: how many steps are done.

        Returns:
            The checkpoint's directory.

        Raises:
            CommandError: it cannot be written; earlier checkpoints stay as they are.
        """
        final = self.directory / f"step-{step:08d}"
        partial = self.directory / f"{_PARTIAL}{final.name}"
        try:
            if not final.exists():
                shutil.rmtree(partial, ignore_errors=True)
                self._write({**state, "random": _random_state()}, partial)
                partial.rename(final)
            _write_synced(self.directory / f"{_PARTIAL}{_LAST}", {"checkpoint": final.name})
            (self.directory / f"{_PARTIAL}{_LAST}").replace(self.directory / _LAST)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CommandError(
                f"cannot write the checkpoint of step {step}: {_cause(error, final)}"
            ) from error
        self._prune(final)
        return final

    def load(self) -> dict[str, Any] | None:
        """The state of the last complete checkpoint, its random states put back; None where there is none.

        Raises:
            CommandError: it was made with other settings, or is damaged.
        """
        if not (self.directory / _LAST).is_file():
            return None
        try:
            last = self.directory / json.loads((self.directory / _LAST).read_text())["checkpoint"]
            saved = json.loads((last / _SETTINGS).read_text())
            state: dict[str, Any] = torch.load(last / _STATE, map_location="cpu", weights_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise CommandError(
                f"the last checkpoint in {self.directory} cannot be read ({error}): "
                f"name an older one in its {_LAST}, or begin anew with another --output"
            ) from error
        self._require_same(saved, last)
        _restore_random_state(state.pop("random"))
        return state

    def _require_same(self, saved: Mapping[str, Any], last: Path) -> None:
        for name, value in self._settings.items():
            if saved.get(name) != value:
                raise CommandError(
                    f"cannot resume from {last}: it was made with {name} {saved.get(name)!r}, "
                    f"now {name} is {value!r}: give the same, or another --output"
                )

    def _write(self, state: Mapping[str, Any], partial: Path) -> None:
        partial.mkdir(parents=True)
        with (partial / _STATE).open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        _write_synced(partial / _SETTINGS, self._settings)

    def _prune(self, latest: Path) -> None:
        complete = sorted(path for path in self.directory.glob("step-*") if path != latest)
        for path in [
            *complete[: max(0, len(complete) + 1 - self._num_kept)],
            *self.directory.glob(f"{_PARTIAL}*"),
        ]:
            shutil.rmtree(path, ignore_errors=True)


def _write_synced(path: Path, content: Mapping[str, Any]) -> None:
    # Without it a power failure could leave the mark pointing at bytes that never reached the disk.
    with path.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _cause(error: Exception, path: Path) -> str:
    # torch.save swallows the system's own words for a full disk, so say how full it is.
    free_mib = shutil.disk_usage(next(parent for parent in path.parents if parent.exists())).free / 2**20
    return f"{' '.join(str(error).split())[:120]} ({free_mib:.1f} MiB are free under {path.parent})"


def _random_state() -> dict[str, Any]:
    name, keys, *rest = numpy.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": [name, numpy.asarray(keys).tolist(), *rest],
    }


def _restore_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
