"""Real sizes on one small machine: peak resident memory and seconds, beside what plain DKM would need.

    python -m bench.scale layer7b

layer7b is one LLaMA-7B decoder layer, step1b a step of fine-tuning of a whole LLaMA of 1.1 billion weights,
pack7b the packing of a LLaMA-7B.
"""

import argparse
import json
from collections.abc import Mapping
from types import ModuleType

from bench.machine import keep, machine
from bench.scale import layer7b, pack7b, step1b

_SUBJECTS: Mapping[str, ModuleType] = {"layer7b": layer7b, "step1b": step1b, "pack7b": pack7b}


def main() -> None:
    """Measure, print, and keep the result when asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.scale", description=(__doc__ or "").partition("\n\n")[0]
    )
    subjects = parser.add_subparsers(dest="subject", required=True)
    for name, module in _SUBJECTS.items():
        subject = subjects.add_parser(name, help=module.__doc__, description=module.__doc__)
        subject.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
        subject.add_argument("--keep", action="store_true", help="also write it to bench/results/")
    options = parser.parse_args()
    module = _SUBJECTS[options.subject]
    result = module.measure() | {"machine": machine()}
    if options.keep:
        keep(f"scale-{options.subject}", result)
    print(json.dumps(result, indent=1) if options.json else module.table(result))


if __name__ == "__main__":
    main()
