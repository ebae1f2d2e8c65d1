"""What every result says of where it was measured, and where results are kept."""

import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Return the machine and the versions that a figure depends on."""
    return {
        "cpu": _cpu_name(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def keep(what: str, result: dict[str, Any]) -> Path:
    """Write a result as `results/<what>_<hardware>_<date>.json` and return the file."""
    path = _path(what)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)
    return path


def kept(what: str) -> dict[str, Any]:
    """Return what was kept under this name here today; nothing where nothing was."""
    path = _path(what)
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _path(what: str) -> Path:
    hardware = "gpu" if torch.cuda.is_available() else f"cpu{os.cpu_count()}"
    return RESULTS / f"{what}_{hardware}_{date.today():%Y%m%d}.json"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
