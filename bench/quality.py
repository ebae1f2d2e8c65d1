"""What 3 bits cost a model, by eDKM and by what a user would pick instead, beside a dense control.

    python -m bench.quality --json --keep

Decoder linears at 3 bits, embedding and head at 8; perplexity by the stream protocol. Straight-through
training and `DKMPalettizer` get the wall time that eDKM's training took.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.machine import keep, kept, machine
from bench.quality_rivals import LeftOutError, Rival, packed, palettizer, rounded, sensitive, straight_through
from integrations.evaluate import evaluate, measure_model
from integrations.finetune import finetune
from integrations.option_types import fraction
from integrations.recipe import Destination, Recipe

_REAL = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
_EDKM, _CONTROL = "eDKM", "dense control"
_RIVALS: Mapping[str, Callable[[Rival], Any]] = {
    "round-to-nearest": rounded,
    "k-means": packed,
    "sensitivity-weighted k-means": sensitive,
    "straight-through": straight_through,
    "DKMPalettizer": palettizer,
}
ROWS = ("dense as it came", _EDKM, _CONTROL, *_RIVALS)
_TRAINED = ("straight-through", "DKMPalettizer")


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Arguments:
        recipe: of eDKM and, dense, of the control.
        text: to score.
        seconds: of training for each trained rival; None is what eDKM takes.
    """

    recipe: Recipe
    text: Path
    seconds: float | None = None


def compare(comparison: Comparison, *, rows: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return perplexity, bits a weight and seconds of each row.

    Raises:
        ValueError: a trained rival is asked for, and nothing says for how long.
    """
    seconds = comparison.seconds
    if seconds is None and _EDKM not in rows and (asked := [row for row in _TRAINED if row in rows]):
        raise ValueError(f"{asked[0]} trains as long as eDKM did: add the row {_EDKM}, or give --seconds")
    found: dict[str, dict[str, Any]] = {}
    for name in (row for row in ROWS if row in rows):
        print(f"bench.quality: {name}", file=sys.stderr)
        found[name] = _row(name, comparison, seconds=seconds)
        if name == _EDKM and seconds is None:
            seconds = found[name]["training_seconds"]
    return found


def _row(name: str, comparison: Comparison, *, seconds: float | None) -> dict[str, Any]:
    recipe, text = comparison.recipe, comparison.text
    if name in (_EDKM, _CONTROL):
        return _finetuned(replace(recipe, dense=name == _CONTROL), text)
    if name not in _RIVALS:
        return evaluate(recipe.model, text)
    try:
        made = _RIVALS[name](Rival(recipe, seconds=seconds or 0.0))
    except LeftOutError as reason:
        return {"left_out": str(reason)}
    score = measure_model(made.model, text, name=recipe.model)
    return {**score, "bits_per_weight": made.bits_per_weight or score["bits_per_weight"], **made.notes}


def _finetuned(recipe: Recipe, text: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model"
        result = finetune(recipe, Destination(output, checkpoint_interval=0))
        notes = {"num_steps": result["num_steps"], "training_seconds": result["seconds"]}
        return {**evaluate(str(output), text), **notes, "held_out_loss": result["held_out_loss_after"]}


def main() -> None:
    """Measure, print, and keep the result when asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--model", default=str(_REAL / "models/stories260K-hf"), help="dense model")
    parser.add_argument(
        "--data",
        type=Path,
        default=_REAL / "text/tinystories_train_sample.txt",
        help="plain text to train on",
    )
    parser.add_argument(
        "--text", type=Path, default=_REAL / "text/tinystories_val.txt", help="plain text to score"
    )
    parser.add_argument(
        "--steps", type=int, default=Recipe.steps, help="of eDKM and the control [%(default)s]"
    )
    parser.add_argument("--seconds", type=fraction, help="of each trained rival [as long as eDKM took]")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", default=ROWS, help=", ".join(ROWS))
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument(
        "--keep", action="store_true", help="also write it to bench/results/, into the rows of the same day"
    )
    options = parser.parse_args()
    for path in (Path(options.model), options.data, options.text):
        if not path.exists():
            parser.error(f"{path} is not there: name your own with --model, --data and --text")
    recipe = Recipe(options.model, options.data, steps=options.steps)
    try:
        rows = compare(Comparison(recipe, options.text, seconds=options.seconds), rows=options.only)
    except ValueError as error:
        parser.error(str(error))
    where = machine()
    rows = {name: {**row, "num_threads": where["num_threads"]} for name, row in rows.items()}
    if options.keep:
        before = kept("quality").get("rows", {})
        keep("quality", {"rows": {**before, **rows}, "machine": where})
    print(json.dumps({"rows": rows, "machine": where}, indent=1) if options.json else _table(rows))


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"{'':30}{'perplexity':>11}{'bits/weight':>12}{'steps':>7}{'training, s':>12}"]
    for name, row in rows.items():
        if "left_out" in row:
            lines.append(f"{name:30}{row['left_out']}")
        else:
            steps, seconds = row.get("num_steps", "-"), row.get("training_seconds", "-")
            lines.append(
                f"{name:30}{row['perplexity']:>11.3f}{row['bits_per_weight']:>12.2f}{steps:>7}{seconds:>12}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
