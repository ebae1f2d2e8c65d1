"""What a fine-tuning run is asked for: its recipe, and where it leaves its files."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "mixed")
PARALLEL = ("ddp", "fsdp")
_ROW_CONTEXT = 512
_STREAM_CONTEXT = 256


@dataclass(frozen=True)
class Recipe:
    """What decides the outcome of a run; a checkpoint resumes only under the same one.

    Arguments:
        model: directory or hub name.
        data: text to train on.
        bits: per weight of the decoder's linears.
        embedding_bits: per weight of embedding and output head; None leaves them dense.
        num_groups: equal parts of a decoder linear's output channels, with a table each.
        dense: train without clustering, as a control.
        distill: fraction of the loss that is the divergence from what the dense model predicts.
        steps: optimizer steps.
        learning_rate: peak, as a fraction of each weight's rms a step.
        batch_size: rows a batch.
        accumulate: batches a step.
        context: tokens a row, BOS included; None is 512, and 256 for a text without separator.
        separator: what parts the documents of a plain text.
        seed: of the order of the rows and whatever else is drawn.
        dtype: of the weights, one of `DTYPES`; `auto` is the checkpoint's own, float32 for float16; `mixed`
            is float32, computed in bfloat16.
        device: where to train.
        parallel: what several ranks do, one of `PARALLEL`.
    """

    model: str
    data: Path
    bits: int = 3
    embedding_bits: int | None = 8
    num_groups: int = 8
    dense: bool = False
    distill: float = 0.0
    steps: int = 1700
    learning_rate: float = 0.01
    batch_size: int = 8
    accumulate: int = 1
    context: int | None = None
    separator: str | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str = "cpu"
    parallel: str = "ddp"

    def max_tokens(self, model_context: int) -> int:
        """Tokens a row, given how many the model was made for."""
        is_stream = self.separator is None and self.data.suffix not in (".json", ".jsonl")
        return min(model_context, self.context or (_STREAM_CONTEXT if is_stream else _ROW_CONTEXT))

    def settings(self) -> dict[str, Any]:
        """What a checkpoint must agree on: the options, and the bytes of the text rather than its name.

        How many ranks there are, and what each of them holds, may change between two parts of a run.
        """
        model = Path(self.model)
        options = {name: value for name, value in asdict(self).items() if name != "parallel"}
        return {
            **options,
            "model": str(model.resolve()) if model.is_dir() else self.model,
            "data": hashlib.sha256(self.data.read_bytes()).hexdigest(),
        }


@dataclass(frozen=True)
class Destination:
    """Where a run leaves its files.

    Arguments:
        output: directory for the model that comes out, and for `checkpoints/`.
        resume: go on from the last checkpoint in it, if there is one.
        checkpoint_interval: steps between two checkpoints; 0 writes one only when interrupted.
        checkpoints_kept: how many of the latest stay.
    """

    output: Path
    resume: bool = False
    checkpoint_interval: int = 100
    checkpoints_kept: int = 2

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.output / "checkpoints"
