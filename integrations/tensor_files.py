"""Tensors of all ranks in safetensors files, through torch's distributed checkpoint: no pickle, no gather.

Each rank writes the shards that it holds, and of what all hold alike a part; what is read goes in place into
the shards of the ranks that there are now. Between the ranks torch sends its plans pickled.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

# What a rank holds of a file it copies into memory before it writes it.
_FILE_BYTES = 256 * 2**20


def write_tensors(tensors: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Write tensors, synced to the disk; every rank calls it, and it ends alike on all of them.

    Arguments:
        tensors: the same names on every rank; no two share memory. DTensors are written by shard, others
            once.
        directory: empty, or not there yet.

    Raises:
        OSError: some rank could not write its part.
    """
    writer = HuggingFaceStorageWriter(
        str(directory), fqn_to_index_mapping=_file_numbers(tensors), save_distributed=True
    )
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _failures_told():
        save(dict(tensors), storage_writer=writer, planner=planner)


class TensorFiles:
    """What `write_tensors` left in a directory, on any number of ranks.

    Raises:
        OSError: a file cannot be read.
        SafetensorError: a file is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self._reader = _ReadOnce(str(directory))

    def require_complete(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Check that every value of `tensors` is there: shards in a file that was lost would stay unfilled.

        Raises:
            OSError: some are not.
        """
        for name, tensor in tensors.items():
            saved = self._reader.metadata.state_dict_metadata.get(name)
            chunks = saved.chunks if isinstance(saved, TensorStorageMetadata) else []
            num_values = sum(math.prod(chunk.sizes) for chunk in chunks)
            if saved is None or num_values != tensor.numel():
                raise OSError(f"of the {tensor.numel()} values of {name} there are {num_values}")

    def read(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fill tensors in place; every rank calls it.

        Arguments:
            tensors: of the names, shapes and dtypes that were written; DTensors by whatever shards.

        Raises:
            OSError: some rank could not read its part.
        """
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with _failures_told():
            load(dict(tensors), storage_reader=self._reader, planner=planner)


class _ReadOnce(HuggingFaceStorageReader):
    """A reader that has read the headers: a damaged one that `load` meets is logged with a traceback."""

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        self.metadata: Metadata = super().read_metadata()

    def read_metadata(self) -> Metadata:
        return self.metadata


def _file_numbers(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Which file a tensor goes to, from 1."""
    numbers, num_bytes = {}, 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + num_bytes // _FILE_BYTES
        num_bytes += tensor.numel() * tensor.element_size()
    return numbers


@contextmanager
def _failures_told() -> Iterator[None]:
    """Raise what failed on some rank, in place of torch's report, which derives from BaseException."""
    try:
        with warnings.catch_warnings():
            # One process alone is no mistake here.
            warnings.filterwarnings("ignore", message="torch.distributed is ", category=UserWarning)
            yield
    except CheckpointException as error:
        failures: dict[int, Any] = error.failures
        rank, (cause, _) = next(iter(failures.items()))
        if isinstance(cause, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise OSError(f"{cause} (on rank {rank})") from error
