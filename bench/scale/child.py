"""Run a function in a process of its own, whose peak of memory is then the function's."""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent.parent


def run_child(function: str, **arguments: Any) -> dict[str, Any]:
    """Call `module:function` with plain arguments in a new process; its progress bar is seen on stderr.

    Returns:
        What it returned, and `peak_bytes`: resident memory at most, the interpreter and PyTorch counted.

    Raises:
        SystemExit: it failed; it has said why.
    """
    command = [sys.executable, "-m", "bench.scale.child", function, json.dumps(arguments)]
    run = subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"{function} ended with exit code {run.returncode}; what it said is above")
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def _peak_bytes() -> int:
    # `ru_maxrss` would begin with the parent's.
    status = Path("/proc/self/status")
    if not status.is_file():
        raise SystemExit("cannot measure the peak of a process here: it is read from Linux's /proc")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    assert found is not None
    return 1024 * int(found[1])


def main(function: str, arguments: str) -> None:
    """Call the function and print its result."""
    module, _, name = function.partition(":")
    result = getattr(import_module(module), name)(**json.loads(arguments))
    print(json.dumps(result | {"peak_bytes": _peak_bytes()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
