"""The command line: `edkm finetune`, `eval`, `palettize`, `export` and `demo`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from integrations.errors import CommandError, InterruptedRunError
from integrations.option_types import at_least_two, bits_or_dense, fraction, natural, positive, share
from integrations.recipe import DTYPES, PARALLEL, Destination, Recipe

_EXTRA = ("transformers", "tokenizers", "tqdm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; what goes wrong is said in one line on stderr.

    Arguments:
        arguments: without the program's name; None takes the process's own.

    Returns:
        The exit code: 0, 1 for what the command cannot do, 128 + the signal's number when interrupted.
    """
    options = _parser().parse_args(arguments)
    try:
        result = options.run(options)
    except InterruptedRunError as error:
        return _fail(error, exit_code=error.exit_code) if _is_first_rank() else error.exit_code
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        return _fail(f"{error.name} is missing, which the commands need: pip install 'edkm[llama]'")
    except CommandError as error:
        return _fail(error)
    except KeyboardInterrupt:
        return _fail("interrupted", exit_code=130)
    if _is_first_rank():
        print(json.dumps(result) if options.json else options.show(result))
    return 0


def _is_first_rank() -> bool:
    """Whether this process speaks for all of a torchrun job, where all have the same to say."""
    return os.environ.get("RANK", "0") == "0"


def _fail(message: object, *, exit_code: int = 1) -> int:
    # One write: what several ranks say at once would stand within each other's lines.
    sys.stderr.write(f"edkm: error: {' '.join(str(message).split())}\n")
    return exit_code


def _lines(result: dict[str, Any]) -> str:
    width = max(len(name) for name in result)
    return "\n".join(f"{name:<{width}}  {_text(value)}" for name, value in result.items())


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(each)}" for name, each in value.items())
    return f"{value:.5g}" if isinstance(value, float) else str(value)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"edkm: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="edkm", description="Compress a language model to a few bits a weight.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_finetune(commands)
    _add_eval(commands)
    _add_palettize(commands)
    _add_export(commands)
    _add_demo(commands)
    return parser


def _add(
    commands: Any,
    name: str,
    *,
    run: Callable[[argparse.Namespace], Any],
    text: str,
    show: Callable[[dict[str, Any]], str] = _lines,
) -> Any:
    parser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("--json", action="store_true", help="print one json object at the end")
    parser.set_defaults(run=run, show=show)
    return parser


def _add_finetune(commands: Any) -> None:
    parser = _add(
        commands, "finetune", run=_finetune, text="train on clustered weights, write them palettized"
    )
    add = parser.add_argument
    add("--model", required=True, help="model directory or hub name")
    add("--data", required=True, type=Path, help="Alpaca .json, .jsonl with `text` fields, or plain text")
    add("--output", required=True, type=Path, help="directory to write; must be empty or new")
    _add_bits(parser)
    add(
        "--dense", action="store_true", help="train alike but without clustering: the control to compare with"
    )
    add(
        "--steps",
        type=positive,
        default=Recipe.steps,
        help="optimizer steps; the schedules end with the last [%(default)s]",
    )
    add(
        "--learning-rate",
        type=fraction,
        default=Recipe.learning_rate,
        help="peak, as a fraction of each weight's rms a step [%(default)s]",
    )
    add("--batch-size", type=positive, default=Recipe.batch_size, help="rows a batch [%(default)s]")
    add(
        "--accumulate",
        type=positive,
        default=Recipe.accumulate,
        help="batches whose gradients make one step [%(default)s]",
    )
    add("--context", type=at_least_two, help="tokens a row [512, or 256 for text without separator]")
    add("--separator", help="what parts the documents of a plain text [none: it is one stream]")
    _add_run(parser)


def _add_run(parser: Any) -> None:
    add = parser.add_argument
    add(
        "--distill",
        type=share,
        default=Recipe.distill,
        metavar="FRACTION",
        help="of the loss that is the divergence from the dense model's predictions, 0 to 1: for text that "
        "it knows; costs a second copy of it and its forward pass [%(default)s]",
    )
    add("--seed", type=natural, default=Recipe.seed, help="of the order of the rows [%(default)s]")
    add(
        "--dtype",
        choices=DTYPES,
        default=Recipe.dtype,
        help="of the weights; auto: the checkpoint's, float32 for float16; bfloat16 and mixed: computed in "
        "bf16, with fp32 masters or on fp32 weights [%(default)s]",
    )
    add(
        "--parallel",
        choices=PARALLEL,
        default=Recipe.parallel,
        help="under torchrun: every rank holds the model, or (fsdp) a part of it [%(default)s]",
    )
    add("--device", default=Recipe.device, help="where to train, such as cuda [%(default)s]")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")
    add(
        "--checkpoint-interval",
        type=natural,
        default=Destination.checkpoint_interval,
        help="steps between two; 0: only when interrupted [%(default)s]",
    )
    add(
        "--checkpoints-kept",
        type=positive,
        default=Destination.checkpoints_kept,
        help="how many of the latest stay [%(default)s]",
    )


def _add_bits(parser: Any) -> None:
    parser.add_argument(
        "--bits",
        type=int,
        default=Recipe.bits,
        help="per weight of the decoder's linears, 1 to 8 [%(default)s]",
    )
    parser.add_argument(
        "--embedding-bits",
        type=bits_or_dense,
        default=Recipe.embedding_bits,
        metavar="BITS",
        help="per weight of embedding and output head, 1 to 8, or `dense` [%(default)s]",
    )
    parser.add_argument(
        "--groups",
        dest="num_groups",
        type=positive,
        default=Recipe.num_groups,
        help="equal parts of a linear's output channels, each with a table of its own; fewer where they do "
        "not part so [%(default)s]",
    )


def _add_eval(commands: Any) -> None:
    parser = _add(commands, "eval", run=_eval, text="perplexity of a text under a dense or palettized model")
    parser.add_argument("--model", required=True, help="model directory or hub name")
    parser.add_argument("--text", required=True, type=Path, help="plain text, scored as one stream")


def _add_palettize(commands: Any) -> None:
    parser = _add(commands, "palettize", run=_palettize, text="pack a model by k-means, without training")
    parser.add_argument("--model", required=True, help="model directory or hub name")
    parser.add_argument("--output", required=True, type=Path, help="directory to write; must be empty or new")
    _add_bits(parser)


def _add_export(commands: Any) -> None:
    parser = _add(commands, "export", run=_export, text="turn a palettized directory into an ordinary one")
    parser.add_argument("--model", required=True, type=Path, help="palettized directory")
    parser.add_argument("--output", required=True, type=Path, help="directory to write; must be empty or new")
    parser.add_argument("--dense", action="store_true", required=True, help="write the snapped weights dense")


def _add_demo(commands: Any) -> None:
    text = "train a tiny model, compress it to 3 bits with and without training, and compare: a few minutes"
    _add(commands, "demo", run=_demo, show=_table, text=text)


# Imported only when they run: `edkm --help` answers at once, and without Transformers.


def _finetune(options: argparse.Namespace) -> dict[str, Any]:
    from integrations.finetune import finetune

    recipe = Recipe(**{field.name: getattr(options, field.name) for field in fields(Recipe)})
    destination = Destination(**{field.name: getattr(options, field.name) for field in fields(Destination)})
    return finetune(recipe, destination)


def _eval(options: argparse.Namespace) -> dict[str, Any]:
    from integrations.evaluate import evaluate

    return evaluate(options.model, options.text)


def _palettize(options: argparse.Namespace) -> dict[str, Any]:
    from integrations.palettized import palettize_directory

    return palettize_directory(
        options.model,
        options.output,
        bits=options.bits,
        embedding_bits=options.embedding_bits,
        num_groups=options.num_groups,
    )


def _export(options: argparse.Namespace) -> dict[str, Any]:
    from integrations.palettized import export_dense

    return export_dense(options.model, options.output)


def _demo(_options: argparse.Namespace) -> dict[str, Any]:
    from integrations.demo import demo

    return demo(Path("edkm-demo"))


def _table(result: dict[str, Any]) -> str:
    from integrations.demo import table

    return table(result)


if __name__ == "__main__":
    sys.exit(main())
