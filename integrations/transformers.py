"""Transformers at the border: models and tokenizers from a directory or the hub, and back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from integrations.directory import is_palettized
from integrations.errors import CommandError

_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_FLOATS = frozenset({"F16", "BF16", "F32", "F64"})

# The commands say themselves what went wrong, on one line, and draw the only progress bar.
transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


class HubTokenizer:
    """A Transformers tokenizer, as `integrations.text.Tokenizer` asks for one.

    Arguments:
        tokenizer: the tokenizer; it must have a BOS and an EOS.
        name: where it came from, for errors.

    Raises:
        CommandError: BOS or EOS is missing.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, *, name: str) -> None:
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise CommandError(
                f"the tokenizer of {name} has no BOS or no EOS token: rows cannot be marked off"
            )
        self._tokenizer = tokenizer
        self.bos: int = tokenizer.bos_token_id
        self.eos: int = tokenizer.eos_token_id

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        if not texts:
            return []
        encoded: list[list[int]] = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return encoded

    def save(self, directory: Path) -> None:
        """Write the tokenizer's files.

        Raises:
            OSError: they cannot be written.
        """
        try:
            self._tokenizer.save_pretrained(directory)
        except Exception as error:  # the tokenizers library has no narrower one for a full disk
            raise OSError(f"cannot save the tokenizer: {error}") from error


def load_tokenizer(name: str) -> HubTokenizer:
    """The tokenizer of a model directory or hub name.

    Raises:
        CommandError: there is none, or it has no BOS or EOS.
    """
    if Path(name).is_dir() and not any(Path(name).glob("tokenizer*")):
        raise CommandError(
            f"{name} has no tokenizer: copy tokenizer.json there from the model it was made of"
        )
    with _reported(f"cannot load the tokenizer of {name}"):
        return HubTokenizer(
            transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False), name=name
        )


def require_model(name: str) -> None:
    """Refuse at once a directory that no dense model can be loaded from; hub names pass.

    Raises:
        CommandError: it lacks its configuration or weights, or is palettized; or the name is neither that of
            a directory nor one that a hub could have.
    """
    directory = Path(name)
    if not directory.is_dir():
        if directory.exists() or not _HUB_NAME.fullmatch(name):
            raise CommandError(f"{name} is neither a directory nor a name on the hub, such as owner/model")
        return
    if not (directory / "config.json").is_file():
        raise CommandError(f"{directory} is not a model directory: it has no config.json")
    if is_palettized(directory):
        raise CommandError(
            f"{directory} is palettized, and a dense model is needed: run edkm export --dense on it"
        )
    if not any(directory.glob("*.safetensors")):
        raise CommandError(f"{directory} has no weights: no *.safetensors file lies in it")


def load_dense(name: str, *, dtype: torch.dtype | None = None) -> transformers.PreTrainedModel:
    """A causal language model with all its weights, in evaluation mode.

    Arguments:
        name: a directory that `save_pretrained` wrote, or a hub name.
        dtype: of the weights; None keeps the checkpoint's.

    Raises:
        CommandError: no such model, an unknown architecture, or weights that are missing, damaged, of another
            shape or dtype, NaN or infinite.
    """
    require_model(name)
    with _reported(f"cannot load {name}"):
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype or "auto",
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # told below, by name
        )
        for file in Path(name).glob("*.safetensors"):
            _require_floats(file, loaded[0])
    model: transformers.PreTrainedModel = loaded[0]
    _require_all(name, loaded[1])
    _require_finite(name, model)
    return model


def _require_all(name: str, found: Mapping[str, Any]) -> None:
    # Transformers fills weights that it did not find, or that do not fit, with random numbers and goes on.
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise CommandError(f"{name} lacks {len(missing)} of the model's weights, such as {missing[0]}")
    for weight, stored, wanted in sorted(found["mismatched_keys"]):
        raise CommandError(
            f"{name} does not fit its config.json: {weight} has shape {list(stored)} in the file, "
            f"{list(wanted)} in the model"
        )


def _require_floats(file: Path, model: nn.Module) -> None:
    # Transformers casts whatever it finds: the integers of a quantized weight are not its values.
    with safe_open(file, framework="pt") as opened:
        for name in dict(model.named_parameters(remove_duplicate=False)).keys() & set(opened.keys()):
            dtype = opened.get_slice(name).get_dtype()
            if dtype not in _FLOATS:
                raise CommandError(
                    f"cannot load {file}: {name} is {dtype}, and weights of 16 bits or more are needed: "
                    "give the model as it was before it was quantized"
                )


def _require_finite(name: str, model: nn.Module) -> None:
    for weight, values in model.named_parameters():
        # Both are NaN where one value is.
        if values.numel() and not torch.stack(values.detach().aminmax()).isfinite().all():
            number = int((~values.detach().isfinite()).sum())
            raise CommandError(
                f"{name} is damaged: {number} of the {values.numel()} values of {weight} are NaN or infinite"
            )


def empty_model(directory: Path) -> transformers.PreTrainedModel:
    """The model that a directory's config.json describes: parameters on the meta device, buffers computed.

    Raises:
        CommandError: there is no config.json, or its architecture is unknown.
    """
    with _reported(f"cannot build the model of {directory}"):
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        with _meta_parameters():
            model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=False
            )
    return model


def model_context(name: str) -> int:
    """How many tokens a model was made for, from its configuration alone.

    Raises:
        CommandError: there is no such model, its architecture is unknown, or its configuration does not say.
    """
    with _reported(f"cannot load {name}"):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        context = getattr(config, "max_position_embeddings", None)
    if not isinstance(context, int) or context < 2:
        raise CommandError(
            f"cannot load {name}: its context is unknown, as max_position_embeddings is {context!r} in the "
            f"configuration of a {config.model_type}; it must be 2 or more"
        )
    return context


def local_directory(name: str) -> Path:
    """Where the files of a directory or of a hub name, once loaded, lie."""
    if Path(name).is_dir():
        return Path(name)
    with _reported(f"cannot find {name}"):
        found = transformers.utils.hub.cached_file(name, "config.json")
    return Path(str(found)).parent


@contextmanager
def _meta_parameters() -> Iterator[None]:
    # `torch.device("meta")` would take along the rotary tables too, and no file brings those back.
    def _to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(_to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _reported(attempt: str) -> Iterator[None]:
    # Transformers explains at length and over several lines; the first sentences carry the cause. What it
    # raises for a damaged file is whatever the line that meets it raises: a division by no heads, for one.
    try:
        yield
    except CommandError:
        raise
    except Exception as error:
        cause = " ".join(str(error).split())[:300]
        if not isinstance(error, OSError | ValueError):
            cause = f"{type(error).__name__}: {cause}"
        raise CommandError(f"{attempt}: {cause}") from error
