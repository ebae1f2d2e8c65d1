"""Whether several ranks come to what one comes to: losses of clustered training, data parallel and FSDP2.

python -m bench.parallel --model llama/ --text text.txt --json
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.machine import keep, machine
from bench.ranks import run_ranks
from edkm import DKMConfig, cluster
from integrations.corpus import Sampler
from integrations.parallel import Replicated, Sharded
from integrations.ranks import Ranks
from integrations.text import read_training_text
from integrations.train import Schedule, Training
from integrations.transformers import load_dense, load_tokenizer, model_context

_NUM_COMPARED = 10
_BATCH_SIZE = 8
_MAX_CONTEXT = 64
_LAYOUTS = ("ddp", "fsdp")


def measure_rank(_rank: int, model: str, text: str, dtype: str, layout: str, steps: str, folder: str) -> None:
    """Write the losses of a run, which are the same on every rank, to `folder`."""
    torch.set_num_threads(1)
    context = min(model_context(model), _MAX_CONTEXT)
    reading = read_training_text(Path(text), load_tokenizer(model), context=context)
    corpus, held_out = reading.corpus.hold_out(64)
    loaded = load_dense(model, dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    clustering = cluster(loaded, DKMConfig(bits=3, num_steps=int(steps)))
    is_mixed = dtype == "mixed"
    training = Training(
        loaded,
        clustering,
        sampler=Sampler(corpus, batch_size=_BATCH_SIZE, seed=0),
        schedule=Schedule(int(steps), learning_rate=0.01),
        parallel=Sharded(loaded, ranks=Ranks(), dtype=torch.bfloat16 if is_mixed else None)
        if layout == "fsdp"
        else Replicated(loaded, ranks=Ranks(), autocast=is_mixed),
    )
    losses = [training.step().loss for _ in range(int(steps))]
    found = {"losses": losses, "held_out": training.held_out_losses(held_out)}
    if dist.get_rank() == 0:
        Path(folder, "losses.json").write_text(json.dumps(found))


def _run(options: argparse.Namespace, *, dtype: str, layout: str, num_ranks: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = (options.model, options.text, dtype, layout, str(options.steps), folder)
        run_ranks("bench.parallel:measure_rank", *arguments, num_ranks=num_ranks, timeout_seconds=1800)
        found: dict[str, Any] = json.loads(Path(folder, "losses.json").read_text())
        return found


def measure(options: argparse.Namespace, *, dtype: str) -> dict[str, Any]:
    """Return how far each number of ranks and layout is from one rank, relatively."""
    alone = _run(options, dtype=dtype, layout="ddp", num_ranks=1)
    rows: dict[str, Any] = {"1 rank": {"last_loss": alone["losses"][-1], "held_out": alone["held_out"]}}
    for num_ranks in options.ranks:
        for layout in _LAYOUTS:
            found = _run(options, dtype=dtype, layout=layout, num_ranks=num_ranks)
            first = zip(found["losses"][:_NUM_COMPARED], alone["losses"], strict=False)
            rows[f"{layout}, {num_ranks} ranks"] = {
                f"first_{_NUM_COMPARED}_losses_off_at_most": max(abs(a / b - 1) for a, b in first),
                "held_out_off": {
                    name: abs(loss / alone["held_out"][name] - 1) for name, loss in found["held_out"].items()
                },
                "last_loss": found["losses"][-1],
            }
            print(dtype, list(rows.items())[-1], file=sys.stderr)
    return rows


def main() -> None:
    """Measure, print, and keep the result when asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.parallel", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--text", required=True, help="plain text to train on, as a stream")
    parser.add_argument("--steps", type=int, default=50, help="of each run (default 50)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="beside 1 (default 2 4)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16", "mixed"])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--keep", action="store_true", help="also write it to bench/results/")
    options = parser.parse_args()
    result: dict[str, Any] = {dtype: measure(options, dtype=dtype) for dtype in options.dtype}
    result["model"] = Path(options.model).name
    if options.keep:
        keep("-".join(["parallel", *options.dtype]), result | {"machine": machine()})
    print(json.dumps(result | {"machine": machine()}, indent=1) if options.json else _lines(result))


def _lines(result: dict[str, Any]) -> str:
    return "\n".join(f"{dtype:9} {rows}" for dtype, rows in result.items())


if __name__ == "__main__":
    main()
