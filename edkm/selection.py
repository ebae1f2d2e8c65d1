"""Which weights of a model are clustered, to how many bits; tied weights are one weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from edkm.config import DKMConfig
from edkm.errors import PaletteError
from edkm.shards import is_sharded, require_finite


@dataclass(frozen=True)
class Choice:
    """A weight to cluster.

    Arguments:
        names: of the modules that share it, in the model's order.
        modules: the same modules.
        bits: of an index.
        trained_soft: a decoder's linear; embeddings and output head train dense.
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    bits: int
    trained_soft: bool

    @property
    def weight(self) -> nn.Parameter:
        """The weight that the modules share."""
        weight = _parameter(self.modules[0])
        assert weight is not None  # `choose` looked
        return weight


def choose(model: nn.Module, config: DKMConfig) -> list[Choice]:
    """Choose the weights that a configuration names.

    Raises:
        PaletteError: tied modules ask for different bits, a weight cannot be clustered as configured or is no
            parameter, or an override matches no linear and no embedding.
    """
    modules = dict(_weighted_modules(model))
    _require_matches(config, modules)
    shared: dict[int, list[str]] = {}
    for name, module in modules.items():
        weight = _parameter(module)
        # One that is computed anew at each read has no identity of its own.
        shared.setdefault(id(module if weight is None else weight), []).append(name)
    head = _output_head(model, modules)
    choices = [_choice(names, modules, config=config, head=head) for names in shared.values()]
    return [choice for choice in choices if choice is not None]


def is_linear(module: nn.Module) -> bool:
    """Whether a module, clustered or not, is a linear layer."""
    return isinstance(module, nn.Linear)


def _parameter(module: nn.Module) -> nn.Parameter | None:
    """The weight of a module, unless something computes it from others."""
    return dict(module.named_parameters(recurse=False)).get("weight")


def _weighted_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear | nn.Embedding):
            yield name, module


def _require_matches(config: DKMConfig, modules: dict[str, nn.Module]) -> None:
    for pattern in config.overrides:
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise PaletteError(
                f"the override {pattern!r} matches no linear and no embedding of the model: "
                f"it has {', '.join(list(modules)[:3]) or 'none'}, ..."
            )


def _output_head(model: nn.Module, modules: dict[str, nn.Module]) -> nn.Module | None:
    """The linear that makes logits: the model's own word for it, or the last one shaped like an embedding."""
    if callable(own := getattr(model, "get_output_embeddings", None)):
        found = own()
        return found if isinstance(found, nn.Module) else None
    shapes = {module.weight.shape for module in modules.values() if isinstance(module, nn.Embedding)}
    linears = [m for m in modules.values() if is_linear(m) and m.weight.shape in shapes]
    return linears[-1] if linears else None


def _choice(
    names: list[str], modules: dict[str, nn.Module], *, config: DKMConfig, head: nn.Module | None
) -> Choice | None:
    dense_trained = {name: not is_linear(modules[name]) or modules[name] is head for name in names}
    wishes: dict[str, int | None] = {}
    for name in names:
        pattern = next((p for p in config.overrides if fnmatchcase(name, p)), None)
        bits = config.embedding_bits if dense_trained[name] else config.bits
        if pattern is not None:
            wishes[name] = config.overrides[pattern]
        elif bits is not None:
            wishes[name] = bits
    if len(set(wishes.values())) > 1:
        said = ", ".join(f"{name}: {'dense' if bits is None else bits}" for name, bits in wishes.items())
        raise PaletteError(f"tied modules share one weight and cannot have different bits ({said}): give one")
    bits = next(iter(wishes.values()), None)
    if bits is None:
        return None
    chosen = tuple(dict.fromkeys(modules[name] for name in names))
    choice = Choice(tuple(names), chosen, bits, trained_soft=not any(dense_trained.values()))
    _require_clusterable(choice, config)
    return choice


def _require_clusterable(choice: Choice, config: DKMConfig) -> None:
    name = " = ".join(choice.names)
    for module in choice.modules:
        if _parameter(module) is None:
            raise PaletteError(
                f"cannot cluster {name}: its weight is no parameter but computed from others, as by "
                "weight_norm or another parametrization: remove that first (torch.nn.utils.parametrize."
                "remove_parametrizations), or leave it dense with an override of None"
            )
        plain = nn.Linear if isinstance(module, nn.Linear) else nn.Embedding
        if type(module).forward is not plain.forward or getattr(module, "max_norm", None) is not None:
            raise PaletteError(
                f"cannot cluster {name}: {type(module).__name__} does more than {plain.__name__}: "
                "leave it dense with an override of None"
            )
    weight = choice.weight
    if is_sharded(weight):
        raise PaletteError(
            f"cannot cluster {name}: it is sharded over ranks already; call cluster first, then fully_shard"
        )
    if weight.shape[1] % config.vector_length:
        raise PaletteError(
            f"cannot cluster {name} of shape {list(weight.shape)} by vectors of {config.vector_length}: that "
            "must divide its rows; leave it dense with an override of None"
        )
    is_wide = weight.is_floating_point() and weight.element_size() > 1
    if weight.is_meta or not is_wide or weight.numel() == 0:
        raise PaletteError(
            f"cannot cluster {name}: it is {weight.dtype} of shape {list(weight.shape)} on {weight.device}; "
            "a weight needs floating-point values of 16 bits or more"
        )
    require_finite(weight, attempt=f"cluster {name}")
