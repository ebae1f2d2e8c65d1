"""The store's own face: arguments and their errors, stats, the report, and whom it names."""

import importlib.util
import itertools
import sys
import textwrap
import weakref
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import ModuleType

import pytest
import torch

from offload import SavedTensorStore, StaleTensorError, Stats, StoreError
from offload.codecs.raw import Raw
from offload.report import human_bytes, report_text
from offload.stats import Counts

SIZE = 64 * 48
BYTES = SIZE * 4


def test_min_bytes_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"min_bytes is -1 bytes; give 0 or more"):
        SavedTensorStore(min_bytes=-1)


@pytest.mark.parametrize("wrong", [[Raw], [Raw(), "bits"], [None]])
def test_what_is_no_codec_is_refused(wrong: list[object]) -> None:
    with pytest.raises(
        TypeError, match=r"uniquify holds .*; give True, False or a sequence of Codec objects"
    ):
        SavedTensorStore(uniquify=wrong)


def test_options_are_named() -> None:
    with pytest.raises(TypeError, match="positional"):
        SavedTensorStore(True)


def test_errors_are_runtime_errors_and_the_stale_one_names_what_it_saw() -> None:
    assert issubclass(StaleTensorError, StoreError)
    assert issubclass(StoreError, RuntimeError)
    x, weight = torch.randn(64, 48), torch.ones(48, 64, requires_grad=True)
    with SavedTensorStore(min_bytes=4096):
        y = weight * x.t()
    x.add_(1).mul_(2)
    with pytest.raises(StaleTensorError) as refused:
        y.sum().backward()
    message = str(refused.value)
    assert "a saved tensor of shape (48, 64), torch.float32, kept by reference" in message
    assert "at version 2 and was saved at version 0" in message
    assert "Change a clone instead" in message


def test_the_figures_of_one_step() -> None:
    x, weight = torch.randn(64, 48), torch.nn.Parameter(torch.randn(48, 10))
    store = SavedTensorStore(min_bytes=4096)
    assert store.stats == Stats()
    with store:
        y = (x @ weight).exp()
        z = (y * y.clone()).sum()
    stats = store.stats
    # x for the weight, y of exp and in the product, and its clone.
    assert stats.num_saved == 5 - (not x.requires_grad)
    assert stats.saved_bytes == BYTES + 3 * 640 * 4
    assert stats.storage_bytes == BYTES + 2 * 640 * 4
    assert stats.held_bytes <= stats.peak_held_bytes
    z.backward()
    after = store.stats
    assert after.held_bytes == 0
    assert (after.saved_bytes, after.peak_held_bytes) == (stats.saved_bytes, stats.peak_held_bytes)


def test_a_storage_by_reference_counts_once_however_many_views_hold_it() -> None:
    x, store = torch.randn(64, 48), SavedTensorStore(min_bytes=4096)
    weights = [torch.ones(64, 48, requires_grad=True) for _ in range(3)]
    with store:
        outputs = [weight * x for weight in weights]
    for number in (3, 2, 1):
        assert len(outputs) == number
        assert store.stats.held_bytes == BYTES
        outputs.pop()
    assert store.stats.held_bytes == 0


def test_every_save_is_counted_by_what_became_of_it() -> None:
    store = SavedTensorStore(uniquify=True, min_bytes=0)
    x, parameter = torch.randn(64, 48), torch.nn.Parameter(torch.randn(48, 48))
    with store:
        hidden = (x @ parameter).relu()
        twice = hidden * hidden + (x.clone() @ parameter) * (hidden > 0)
    stats = store.stats
    assert sum(stats.num_by_stage.values()) == stats.num_saved
    assert {"bits", "content", "reference"} <= set(stats.num_by_stage)
    del twice


def test_counts_and_peak_start_anew_with_each_step_and_held_bytes_do_not() -> None:
    store, x = SavedTensorStore(min_bytes=0), torch.randn(64, 48, requires_grad=True)
    with store:
        kept = x.exp().exp().exp()
    assert store.stats.held_bytes == 3 * BYTES
    with store:
        pass
    assert (store.stats.num_saved, store.stats.saved_bytes) == (0, 0)
    assert store.stats.held_bytes == store.stats.peak_held_bytes == 3 * BYTES
    del kept
    assert store.stats.held_bytes == 0


def test_stats_are_a_reading() -> None:
    store, x = SavedTensorStore(min_bytes=0), torch.randn(64, 48, requires_grad=True)
    with store:
        x.exp()
        reading = store.stats
        x.sin()
    assert (reading.num_saved, store.stats.num_saved) == (1, 2)
    with pytest.raises(FrozenInstanceError):
        reading.num_saved = 3
    with pytest.raises(TypeError):
        reading.num_by_stage["bits"] = 1


def test_the_report_says_who_saved_what_and_what_became_of_it() -> None:
    store, x = SavedTensorStore(uniquify=True, min_bytes=4096), torch.randn(64, 48, requires_grad=True)
    with store:
        hidden = x.exp()
        signs = hidden * x.sign()
    lines = store.report().splitlines()
    here = f"{Path(__file__).parent.name}/{Path(__file__).name}"
    assert lines[0].startswith("saved 36.0 KiB in 3 tensors, on 24.0 KiB of storage; held ")
    assert sum(here in line for line in lines) == 2
    assert any("float32[64, 48]: bits 1" in line for line in lines)
    del signs


def test_the_report_of_nothing_is_one_line() -> None:
    assert SavedTensorStore().report().splitlines() == [
        "saved 0 B in 0 tensors, on 0 B of storage; held 0 B, at most 0 B"
    ]


def test_the_report_shows_the_twenty_largest_rows_and_counts_the_rest() -> None:
    counts = Counts()
    for number in range(50):
        row = counts.row(f"a/b.py:{number}", shape=torch.Size([number]), dtype=torch.float32)
        row.count("reference")
    lines = report_text(counts.stats(0, 0), counts.list_rows()).splitlines()
    assert len(lines) == 1 + 1 + 20 + 1
    assert "a/b.py:49" in lines[2]
    assert "a/b.py:30" in lines[21]
    assert lines[-1] == "and 30 smaller rows"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1 << 20, "1.0 MiB"),
        (5 << 40, "5.0 TiB"),
        (5 << 50, "5120.0 TiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_sizes_are_written_for_people(num_bytes: int, *, text: str) -> None:
    assert human_bytes(num_bytes) == text


def module_at(path: Path) -> ModuleType:
    """Write a module that calls an operator on its third line, and import it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        textwrap.dedent("""\
        def call(x):
            # the line below saves
            return x.exp()
    """)
    )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_is_the_innermost_line_outside_torch(tmp_path: Path) -> None:
    caller = module_at(tmp_path / "model" / "layers.py")
    store, x = SavedTensorStore(min_bytes=0), torch.randn(9, requires_grad=True)
    with store:
        torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Softmax(0))(caller.call(x))
    assert "model/layers.py:3" in store.report()
    assert f"{Path(__file__).parent.name}/{Path(__file__).name}" in store.report()
    assert "torch/nn" not in store.report()


@pytest.mark.parametrize("package", ["torch", "offload"])
def test_a_neighbour_whose_name_begins_alike_is_not_skipped(package: str, *, tmp_path: Path) -> None:
    """torchvision lies beside torch, and a user's experiments may lie beside this package."""
    from offload import site

    folder = Path(sys.modules[package].__file__).parent
    assert not any(f"{folder}vision/models.py".startswith(skipped) for skipped in site._PACKAGES)
    assert any(f"{folder}/nn/functional.py".startswith(skipped) for skipped in site._PACKAGES)


def test_each_shape_dtype_and_line_is_a_row_of_its_own() -> None:
    store = SavedTensorStore(min_bytes=0)
    with store:
        for size, dtype in itertools.product((3, 5), (torch.float32, torch.float64)):
            for _ in range(2):
                torch.randn(size, dtype=dtype, requires_grad=True).exp()
    assert len(store.report().splitlines()) == 1 + 1 + 4
    assert store.stats.num_saved == 8


@pytest.mark.parametrize("options", [{}, {"uniquify": True}, {"shard": True}])
def test_a_store_goes_with_its_last_reference(options: dict[str, bool]) -> None:
    store = SavedTensorStore(**options)  # type: ignore[arg-type]
    with store:
        loss = torch.randn(1 << 15, requires_grad=True).square().sum()
    loss.backward()
    del loss
    gone = weakref.ref(store)
    del store
    assert gone() is None
