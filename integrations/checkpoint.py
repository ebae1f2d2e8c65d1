"""Checkpoints on disk: complete or not there, the last one marked, read back by any number of ranks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from integrations.directory import remove_if_empty
from integrations.errors import CommandError
from integrations.random_state import random_state, restore_random_state
from integrations.ranks import Ranks
from integrations.tensor_files import TensorFiles, write_tensors

_LAST = "last.json"
_SETTINGS = "settings.json"
_STATE = "state.json"
_PARTIAL = ".partial-"


class Checkpoints:
    """The checkpoints of one run, in one directory; every rank makes the same calls.

    Arguments:
        directory: made with the first checkpoint, and seen by all ranks.
        settings: what the run was asked for, by option; a run with others cannot resume.
        num_kept: how many of the latest stay.
        ranks: who writes and reads.
    """

    def __init__(self, directory: Path, *, settings: Mapping[str, Any], num_kept: int, ranks: Ranks) -> None:
        self.directory = directory
        self._settings = dict(settings)
        self._num_kept = num_kept
        self._ranks = ranks

    def save(self, state: Mapping[str, Any], *, step: int) -> Path:
        """Write a checkpoint, mark it as the last, and remove those beyond the number kept.

        Arguments:
            state: tensors, of which each rank writes what it holds, and what JSON takes, which is written as
                the first rank has it; the random states of all ranks are added.
            step: how many steps are done.

        Returns:
            The checkpoint's directory.

        Raises:
            CommandError: it cannot be written; earlier checkpoints stay as they are.
        """
        final = self.directory / f"step-{step:08d}"
        partial = self.directory / f"{_PARTIAL}{final.name}"
        failure: OSError | None = None
        try:
            if not self._ranks.largest(self._ranks.is_first and final.exists()):
                self._write(state, partial, final=final)
            if self._ranks.is_first:
                self._mark(final)
        except OSError as error:
            failure = error
        # All ranks wait here, and all of them fail: one that ended alone would take the others with it.
        if self._ranks.largest(failure is not None):
            shutil.rmtree(partial, ignore_errors=True)
            remove_if_empty(self.directory)
            cause = "another rank says why" if failure is None else _cause(failure, final)
            raise CommandError(f"cannot write the checkpoint of step {step}: {cause}") from failure
        return final

    def load(self, state: Mapping[str, Any]) -> dict[str, Any] | None:
        """Fill tensors in place from the last complete checkpoint, and put its random states back.

        Arguments:
            state: as `save` takes it; what of it is no tensor is not read.

        Returns:
            What was saved and is no tensor; None where there is no checkpoint.

        Raises:
            CommandError: it was made with other settings or of another model, it is damaged, or the ranks do
                not see the same one.
        """
        last = self._last()
        if last is None:
            return None
        tensors = _tensors(state)
        try:
            self._require_same(_read_object(last / _SETTINGS), last)
            saved = _read_object(last / _STATE, shapes=dict, rest=dict, random=list)
            _require_shapes(saved["shapes"], _shapes(tensors), last)
            files = TensorFiles(last)
            files.require_complete(tensors)
            files.read(tensors)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise self._unreadable(error) from error
        of_ranks, rank = saved["random"], self._ranks.rank
        restore_random_state(of_ranks[rank if rank < len(of_ranks) else 0])
        rest: dict[str, Any] = saved["rest"]
        return rest

    def _write(self, state: Mapping[str, Any], partial: Path, *, final: Path) -> None:
        """Write all but the mark, every rank its part."""
        random_states = self._ranks.gathered(random_state())
        if self._ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        # Nobody writes before what an earlier attempt left is gone.
        self._ranks.wait()
        tensors = _tensors(state)
        write_tensors(tensors, partial)
        if self._ranks.is_first:
            rest = {name: value for name, value in state.items() if name not in tensors}
            content = {"shapes": _shapes(tensors), "rest": rest, "random": random_states}
            _write_synced(partial / _STATE, content)
            _write_synced(partial / _SETTINGS, self._settings)
            partial.rename(final)

    def _mark(self, final: Path) -> None:
        _write_synced(self.directory / f"{_PARTIAL}{_LAST}", {"checkpoint": final.name})
        (self.directory / f"{_PARTIAL}{_LAST}").replace(self.directory / _LAST)
        self._prune(final)

    def _last(self) -> Path | None:
        """The checkpoint that is marked as the last."""
        name = ""
        try:
            if (self.directory / _LAST).is_file():
                name = _read_object(self.directory / _LAST, checkpoint=str)["checkpoint"]
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error
        if any(seen != name for seen in self._ranks.gathered(name)):
            raise CommandError(
                f"the ranks see different checkpoints in {self.directory}: it must lie on a file system "
                "that all of them share"
            )
        return self.directory / name if name else None

    def _unreadable(self, error: Exception) -> CommandError:
        return CommandError(
            f"the last checkpoint in {self.directory} cannot be read ({error}): "
            f"name an older one in its {_LAST}, or begin anew with another --output"
        )

    def _require_same(self, saved: Mapping[str, Any], last: Path) -> None:
        for name, value in self._settings.items():
            if saved.get(name) != value:
                raise CommandError(
                    f"cannot resume from {last}: it was made with {name} {saved.get(name)!r}, "
                    f"now {name} is {value!r}: give the same, or another --output"
                )

    def _prune(self, latest: Path) -> None:
        complete = sorted(path for path in self.directory.glob("step-*") if path != latest)
        for path in [
            *complete[: max(0, len(complete) + 1 - self._num_kept)],
            *self.directory.glob(f"{_PARTIAL}*"),
        ]:
            shutil.rmtree(path, ignore_errors=True)


def _tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    return {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()}


def _require_shapes(saved: Mapping[str, str], now: Mapping[str, str], last: Path) -> None:
    for name in sorted(saved.keys() | now.keys()):
        if saved.get(name) != now.get(name):
            raise CommandError(
                f"the checkpoint {last} does not fit the model, which must have changed since: {name} was "
                f"{saved.get(name, 'not there')}, now it is {now.get(name, 'not there')}; "
                "name another --output"
            )


def _read_object(path: Path, **kinds: type) -> dict[str, Any]:
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} was edited: it is a json {type(found).__name__}, not an object")
    for name, kind in kinds.items():
        if not isinstance(found.get(name), kind) or found[name] in ("", []):
            raise ValueError(f"{path.name} was edited: its {name} is {str(found.get(name))[:40]!r}")
    return found


def _write_synced(path: Path, content: Mapping[str, Any]) -> None:
    # Without it a power failure could leave the mark pointing at bytes that never reached the disk.
    with path.open("w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())


def _cause(error: Exception, path: Path) -> str:
    free_mib = shutil.disk_usage(next(parent for parent in path.parents if parent.exists())).free / 2**20
    return f"{' '.join(str(error).split())[:120]} ({free_mib:.1f} MiB are free under {path.parent})"
