"""`import offload` costs what it needs and starts nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROBE = """
import sys
import torch
before = set(sys.modules)
import {package}
import json, threading
loaded = {{name.partition(".")[0] for name in set(sys.modules) - before}} - set(sys.stdlib_module_names)
print(json.dumps({{
    "loaded": sorted(loaded),
    "compiler": "torch._dynamo" in set(sys.modules) - before,
    "cuda": torch.cuda.is_initialized(),
    "group": torch.distributed.is_available() and torch.distributed.is_initialized(),
    "num_threads": threading.active_count(),
}}))
"""
NEEDED = {
    "offload": {"offload", "torch", "numpy", "psutil", "xxhash", "msgpack"},
    "edkm": {"edkm", "offload", "torch", "numpy", "psutil", "xxhash", "msgpack", "safetensors"},
}
# Compiled extension modules enter sys.modules under a top-level name of their own.
EXTENSIONS = {"xxhash": {"_xxhash"}, "psutil": {"_psutil_linux", "_psutil_posix"}}


def probe(package: str, *, root: Path) -> dict[str, object]:
    """Import the package in a fresh interpreter, warnings being errors, and return what that did."""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE.format(package=package)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("package", sorted(NEEDED))
def test_import_loads_what_it_needs_and_starts_nothing(package: str, root: Path) -> None:
    seen = probe(package, root=root)
    allowed = NEEDED[package].union(*EXTENSIONS.values())
    assert set(seen.pop("loaded")) <= allowed
    assert seen == {"compiler": False, "cuda": False, "group": False, "num_threads": 1}
