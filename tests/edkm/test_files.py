"""Saved and loaded: the same bits, no larger than promised, whole or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from edkm import DKMConfig, PaletteError, cluster, load_palettized, palettize, save_palettized
from edkm.save import save_parts
from tests.edkm.models import TinyLM, tokens


def palettized(**options: object) -> TinyLM:
    return palettize(TinyLM(tied=options.pop("tied", True)), DKMConfig(**options)).eval()


def meta(*, tied: bool = True) -> TinyLM:
    """A model without values, but for its buffers."""
    model = TinyLM(tied=tied)
    scale = model.scale
    model.to("meta")
    model.scale = scale
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("embedding_bits", [None, 8])
@pytest.mark.parametrize("options", [{}, {"vector_length": 2}, {"num_groups": 4, "bits": 1}])
def test_the_loaded_model_is_the_saved_one_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, tied: bool, embedding_bits: int | None, options: dict[str, int]
) -> None:
    model = TinyLM(tied=tied).to(dtype)
    palettize(model, DKMConfig(embedding_bits=embedding_bits, **options)).eval()
    save_palettized(model, tmp_path / "new")
    batch = tokens()
    for into in (meta(tied=tied), TinyLM(tied=tied).eval()):
        loaded = load_palettized(tmp_path / "new", into=into)
        assert loaded is into
        with torch.no_grad():
            assert torch.equal(loaded(batch), model(batch))
        assert loaded.layers[0].norm.weight.dtype == loaded.layers[0].up_proj.weight.dtype == dtype
        if tied and embedding_bits:
            assert loaded.lm_head.palette is loaded.embed_tokens.palette
        elif tied:
            assert loaded.lm_head.weight is loaded.embed_tokens.weight
        assert loaded.layers[0].norm.weight.requires_grad


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_file_is_as_small_as_promised(tmp_path: Path, bits: int) -> None:
    model = TinyLM(width=64, hidden=172, num_blocks=3)
    palettize(model, DKMConfig(bits=bits, embedding_bits=8))
    save_palettized(model, tmp_path)
    num_weights = 3 * (64 * 64 + 3 * 64 * 172)
    packed = num_weights * bits / 8 + 48 * 64
    tables = 4 * (12 * 2**bits + 256)
    dense = 4 * (3 * 64 + 3 * 64 + 1)
    num_tensors = 2 * 13 + 7
    size = (tmp_path / "palettized.safetensors").stat().st_size
    assert size <= 1.01 * (packed + tables + dense) + 160 * num_tensors
    with safe_open(tmp_path / "palettized.safetensors", framework="pt") as opened:
        assert len(opened.keys()) == num_tensors


def test_nothing_in_a_directory_is_pickled(tmp_path: Path) -> None:
    save_palettized(palettized(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"palettized.safetensors", "palettized.json"}


def test_large_files_come_in_parts(tmp_path: Path) -> None:
    model = palettized(embedding_bits=8)
    save_parts([("", model)], tmp_path, shard_bytes=900)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"palettized-00001-of-{len(names):05d}.safetensors"
    index = json.loads((tmp_path / "palettized.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(names)
    stored = {key: value for name in names for key, value in load_file(tmp_path / name).items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    batch = tokens()
    with torch.no_grad():
        assert torch.equal(load_palettized(tmp_path, into=meta())(batch), model(batch))
    (tmp_path / names[1]).unlink()
    with pytest.raises(PaletteError, match="missing, truncated or damaged"):
        load_palettized(tmp_path, into=meta())


def test_a_model_that_is_one_linear(tmp_path: Path) -> None:
    model = palettize(nn.Linear(6, 4), DKMConfig(bits=2))
    save_palettized(model, tmp_path)
    loaded = load_palettized(tmp_path, into=nn.Linear(6, 4))
    assert torch.equal(loaded.weight, model.weight)
    assert torch.equal(loaded.bias, model.bias)


def test_a_module_that_stands_in_two_places(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        linear = nn.Linear(6, 6)
        return nn.Sequential(linear, nn.ReLU(), linear)

    model, x = build(), torch.randn(2, 6)
    cluster(model, DKMConfig())
    expected = model.eval()(x)
    assert torch.equal(palettize(model)(x), expected)
    save_palettized(model, tmp_path)
    loaded = load_palettized(tmp_path, into=build())
    assert torch.equal(loaded(x), expected)
    assert loaded[0].palette is loaded[2].palette


def test_a_directory_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="is not empty; name a new directory"):
        save_palettized(palettized(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_dense_or_clustered_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PaletteError, match="cannot save: no module of the model runs from a palette"):
        save_palettized(TinyLM(), tmp_path / "x")
    model = nn.ModuleList([palettized(), TinyLM()])
    cluster(model[1], DKMConfig())
    with pytest.raises(PaletteError, match=r"cannot save 1\..*still clustered; palettize the model first"):
        save_palettized(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_cannot_be_loaded_is_not_saved(tmp_path: Path) -> None:
    model = palettized()
    model.register_buffer("narrow", torch.ones(2).to(torch.float8_e4m3fn))
    with pytest.raises(PaletteError, match=r"cannot save narrow: it is torch.float8_e4m3fn, which load_pal"):
        save_palettized(model, tmp_path / "x")
    model.narrow = None
    model.normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(1, 2, 1))
    with pytest.raises(PaletteError, match=r"cannot save normed\..*original0: a parametrization computes"):
        save_palettized(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("fails_at", ["weights", "manifest", "move"])
def test_a_failure_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existed: bool, fails_at: str
) -> None:
    directory = tmp_path / "out"
    if existed:
        directory.mkdir()
    full = OSError(28, "No space left on device")

    def broken(tensors: dict[str, torch.Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise full

    def refuse(self: Path, *arguments: object) -> None:
        if fails_at == "manifest" or self.name == "palettized.json":
            raise full
        self.rename(*arguments)

    if fails_at == "weights":
        monkeypatch.setattr("edkm.writer.save_file", broken)
    else:
        monkeypatch.setattr(Path, "write_text" if fails_at == "manifest" else "replace", refuse)
    with pytest.raises(OSError, match=r"cannot save \d+ bytes to .*, nothing is left: .*No space left"):
        save_palettized(palettized(), directory)
    assert directory.exists() == existed
    assert not existed or not list(directory.iterdir())


FULL_DISK = """
import resource, signal, sys
from edkm import DKMConfig, palettize, save_palettized
from tests.edkm.models import TinyLM
model = palettize(TinyLM(width=64, hidden=172), DKMConfig(bits=8))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    save_palettized(model, sys.argv[1])
except OSError as error:
    print(error)
"""


def test_a_file_that_the_system_cuts_short(tmp_path: Path, root: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "out")],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "nothing is left" in run.stdout
    assert not (tmp_path / "out").exists()


PEAK = r"""
import re, sys, torch
from pathlib import Path
from torch import nn
from edkm import DKMConfig, load_palettized, palettize, save_palettized
from edkm.manifest import Manifest
from edkm.writer import Writer
num_layers, width = 16, 1024
if sys.argv[2] == "write":
    names = [str(i) for i in range(num_layers)]
    with Writer(Path(sys.argv[1]) / "large", shard_bytes=10**9) as writer:
        for name in names:
            writer.add(name + ".palette.table", torch.randn(1, 256, 1))
            writer.add(name + ".palette.indices", torch.zeros(8, width * width // 8, dtype=torch.uint8))
        writer.finish(Manifest({n: (width, width) for n in names}, {n: n for n in names}, {}))
    small = palettize(nn.Sequential(nn.Linear(8, 8, bias=False)), DKMConfig(bits=8))
    save_palettized(small, Path(sys.argv[1]) / "small")
else:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(num_layers)))
    def peak():
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    # What the first load brings along, modules and buffers of the interpreter, is not the file's.
    load_palettized(sys.argv[1] + "/small", into=nn.Sequential(nn.Linear(8, 8, bias=False)))
    before = peak()
    load_palettized(sys.argv[1] + "/large", into=model)
    print((peak() - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's peak of a process")
def test_loading_peaks_at_the_file_and_one_layer(tmp_path: Path, root: Path) -> None:
    directory = tmp_path / "out"
    for mode in ("write", "load"):
        run = subprocess.run(
            [sys.executable, "-c", PEAK, str(directory), mode],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    size = (directory / "large" / "palettized.safetensors").stat().st_size
    layer = size / 16
    assert size * 0.9 < int(run.stdout) <= size + layer + 2**20


def test_whoever_may_read_the_manifest_may_read_the_weights(tmp_path: Path) -> None:
    save_palettized(palettize(nn.Sequential(nn.Linear(8, 8)), DKMConfig(bits=2)), tmp_path / "model")
    assert len({path.stat().st_mode for path in (tmp_path / "model").iterdir()}) == 1
