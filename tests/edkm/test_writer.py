"""A model saved part by part: the same directory, in the memory of a part, whole or not at all."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from edkm import DKMConfig, PaletteError, load_palettized, palettize, save_palettized
from edkm.save import save_parts
from edkm.writer import Writer
from tests.edkm.models import TinyLM, tokens

CONFIG = DKMConfig(bits=3, embedding_bits=8)


def parts_of(model: TinyLM) -> Iterator[tuple[str, nn.Module]]:
    yield "embed_tokens", model.embed_tokens
    for number, layer in enumerate(model.layers):
        yield f"layers.{number}", layer
    yield "lm_head", model.lm_head


@pytest.mark.parametrize("shard_bytes", [10**9, 900])
def test_parts_make_the_directory_of_the_whole(tmp_path: Path, shard_bytes: int) -> None:
    model = palettize(TinyLM(tied=False), CONFIG).eval()
    del model.scale
    model.scale = torch.tensor(0.5)  # no part has it
    save_parts(parts_of(model), tmp_path / "parts", shard_bytes=shard_bytes)
    into = TinyLM(tied=False).eval()
    del into.scale
    into.scale = torch.tensor(0.5)
    batch = tokens()
    with torch.no_grad():
        assert torch.equal(load_palettized(tmp_path / "parts", into=into)(batch), model(batch))


@pytest.mark.parametrize("error", [RuntimeError("no such layer"), KeyboardInterrupt()])
def test_an_error_in_the_making_of_a_part_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def parts() -> Iterator[tuple[str, nn.Module]]:
        yield "0", palettize(nn.Linear(64, 64), CONFIG)
        yield "1", palettize(nn.Linear(64, 64), CONFIG)
        raise error

    with pytest.raises(type(error)):
        save_parts(parts(), tmp_path / "out", shard_bytes=100)
    assert not list(tmp_path.iterdir())


def test_two_parts_of_one_name_and_no_palette_at_all_are_refused(tmp_path: Path) -> None:
    linear = palettize(nn.Linear(8, 8), CONFIG)
    with pytest.raises(ValueError, match=r"cannot save 0\.palette\.table twice: each part needs names"):
        save_palettized([("0", linear), ("0", linear)], tmp_path / "out")
    with pytest.raises(PaletteError, match="no module of the model runs from a palette"):
        save_palettized([("0", nn.Linear(8, 8))], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_part_is_gone_before_the_next_one_is_made(tmp_path: Path) -> None:
    alive: list[int] = []

    class Counted(nn.Module):
        num_alive = 0

        def __init__(self) -> None:
            super().__init__()
            self.linear = palettize(nn.Linear(8, 8), CONFIG)
            Counted.num_alive += 1

        def __del__(self) -> None:
            Counted.num_alive -= 1

    def parts() -> Iterator[tuple[str, nn.Module]]:
        for number in range(4):
            alive.append(Counted.num_alive)
            yield str(number), Counted()

    save_palettized(parts(), tmp_path / "out")
    assert alive == [0, 0, 0, 0]


def test_a_writer_that_is_left_unfinished_leaves_nothing(tmp_path: Path) -> None:
    with Writer(tmp_path / "out", shard_bytes=10) as writer:
        writer.add("a", torch.ones(5))
        writer.add("b", torch.ones(5))
        assert (tmp_path / "out" / ".partial" / "0.safetensors").is_file()
    assert not list(tmp_path.iterdir())


PEAK = r"""
import re, sys, torch
from pathlib import Path
from torch import nn
from edkm import DKMConfig, palettize
from edkm.save import save_parts
def parts(num):
    for number in range(num):
        torch.manual_seed(0)  # what one part takes is not the matter
        layer = nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16)
        yield str(number), palettize(layer, DKMConfig(bits=8))
        del layer
def peak():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
save_parts(parts(3), Path(sys.argv[1]) / "few", shard_bytes=2**22)
before = peak()
save_parts(parts(40), Path(sys.argv[1]) / "many", shard_bytes=2**22)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's peak of a process")
def test_memory_does_not_grow_with_the_number_of_parts(tmp_path: Path, root: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)],
        cwd=root,
        # One thread: each of more keeps a heap of its own. A threshold that is given does not rise, as it
        # otherwise does with the first large block that is freed: what is freed then goes back.
        env={
            **os.environ,
            "PYTHONPATH": str(root),
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": "131072",
            "MALLOC_TRIM_THRESHOLD_": "131072",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    # 37 parts more, of a megabyte packed and two before.
    assert int(run.stdout) < 8 * 2**20
