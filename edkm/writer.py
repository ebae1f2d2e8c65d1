"""Write a palettized directory one tensor at a time, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from edkm.manifest import INDEX, MANIFEST, WEIGHTS, Manifest

_PARTIAL = ".partial"


class Writer:
    """A context in which tensors are added to a directory, and `finish` puts it in place.

    All is written to a folder inside of the directory and moved at the end, the manifest last. Left without
    `finish`, by an exception or not, the directory is as it was before. It holds tensors until they fill a
    file.

    Arguments:
        directory: new or empty.
        shard_bytes: of a file at most, where one tensor allows.

    Raises:
        FileExistsError: on entering: the directory is not empty.
        OSError: from `add` and `finish`: writing failed.
    """

    def __init__(self, directory: Path, *, shard_bytes: int) -> None:
        self._directory = directory
        self._partial = directory / _PARTIAL
        self._shard_bytes = shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._files: list[list[str]] = []
        self._num_bytes = 0
        self._is_new = self._is_finished = False

    def __enter__(self) -> Writer:
        self._is_new = not self._directory.exists()
        if not self._is_new and any(self._directory.iterdir()):
            raise FileExistsError(f"cannot save to {self._directory}: it is not empty; name a new directory")
        self._partial.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pending.clear()
        if self._is_finished:
            return
        # It was empty, so what is in it is ours.
        for path in [self._partial, *self._directory.glob("palettized*")]:
            _remove(path)
        if self._is_new:
            self._directory.rmdir()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor, and write those that fill a file.

        Raises:
            ValueError: there is one of that name already.
        """
        if name in self._pending or any(name in names for names in self._files):
            raise ValueError(f"cannot save {name} twice: each part needs names of its own")
        stored = _storable(tensor)
        pending_bytes = sum(each.nbytes for each in self._pending.values())
        if self._pending and pending_bytes + stored.nbytes > self._shard_bytes:
            self._flush()
        self._pending[name] = stored
        self._num_bytes += stored.nbytes

    def finish(self, manifest: Manifest) -> None:
        """Write the rest, and move everything to its place."""
        self._flush()
        with self._told():
            self._name_files()
            (self._partial / MANIFEST).write_text(manifest.to_json())
            for path in self._partial.iterdir():
                # safetensors makes files for their owner alone
                path.chmod((self._partial / MANIFEST).stat().st_mode)
            # What makes it a palettized directory comes last.
            for path in sorted(self._partial.iterdir(), key=lambda path: path.name == MANIFEST):
                path.replace(self._directory / path.name)
            self._partial.rmdir()
        self._is_finished = True

    def _flush(self) -> None:
        with self._told():
            save_file(self._pending, self._numbered(len(self._files)))
        self._files.append(list(self._pending))
        self._pending = {}

    def _name_files(self) -> None:
        """Only now is it known how many there are."""
        if len(self._files) == 1:
            self._numbered(0).rename(self._partial / WEIGHTS)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._files):
            file = f"palettized-{number + 1:05d}-of-{len(self._files):05d}.safetensors"
            self._numbered(number).rename(self._partial / file)
            weight_map.update(dict.fromkeys(names, file))
        content = {"metadata": {"total_size": self._num_bytes}, "weight_map": weight_map}
        (self._partial / INDEX).write_text(json.dumps(content, indent=1))

    def _numbered(self, number: int) -> Path:
        return self._partial / f"{number}.safetensors"

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"cannot save {self._num_bytes} bytes to {self._directory}, nothing is left: {error}"
            ) from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _storable(tensor: torch.Tensor) -> torch.Tensor:
    # Views of one storage are refused by the format, and would keep all of it; each gets bytes of its own.
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
