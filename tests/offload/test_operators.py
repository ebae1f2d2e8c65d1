"""Every operator of PyTorch's own database: under a store, no bit of forward or backward differs (Law 1).

Left out by rule and counted: samples without a gradient, samples whose plain run raises, and samples whose
two plain runs differ. Of the operators in `UNSTEADY` the gradients are compared and the outputs are not.
"""

import random
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context

import numpy
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils._pytree import tree_leaves

from offload import SavedTensorStore, patience
from offload.codecs import DEFAULT_CODECS
from offload.testing import Forced

DTYPES = (torch.float32, torch.bfloat16, torch.complex64)
NUM_LISTED = 24  # some operators list a thousand samples
NUM_FIRST = 3
NUM_DRAWN = 2
# 200 plain runs give up to four outputs, each by the alignment of LAPACK's scratch memory, and one gradient.
UNSTEADY = frozenset({"linalg.lstsq", "linalg.lstsq.grad_oriented"})
SPARSE_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


Part = tuple[str, tuple[int, ...], bytes]


@dataclass(frozen=True)
class Outcome:
    """What one forward and backward gave, and the warnings on the way."""

    outputs: tuple[Part, ...]
    gradients: tuple[Part, ...]
    warned: frozenset[str]


@dataclass(frozen=True)
class Sweep:
    """What was seen over all operators of one dtype."""

    num_samples: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    num_by_stage: dict[str, Counter[str]] = field(default_factory=dict)
    breaches: list[str] = field(default_factory=list)


def stores() -> Mapping[str, SavedTensorStore]:
    """Return the stores under test. Each serves all samples, so addresses and contents recur.

    In a store named for a codec none may decline and that codec has its turn first; the others follow it,
    since `keyed` needs a list that another one made.
    """
    forced = {codec.name: Forced(codec) for codec in DEFAULT_CODECS}
    return {
        "copies": SavedTensorStore(min_bytes=0, dedupe=False),
        "uniquify": SavedTensorStore(min_bytes=0, uniquify=True),
        **{
            name: SavedTensorStore(min_bytes=0, uniquify=[*forced.values(), codec])
            for name, codec in forced.items()
        },
    }


def seed_all(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes longer than most operators


def samples(op: OpInfo, dtype: torch.dtype) -> list[SampleInput]:
    """Return the first few samples of an operator and as many drawn from the next ones."""
    listed = list(islice(op.sample_inputs("cpu", dtype, requires_grad=True), NUM_LISTED))
    drawn = random.sample(listed[NUM_FIRST:], min(NUM_DRAWN, len(listed[NUM_FIRST:])))
    return listed[:NUM_FIRST] + drawn


def bits(tensor: Tensor | None) -> Iterator[Part]:
    """Yield dtype, shape and bytes, by which -0.0 is not 0.0 and a NaN equals itself."""
    if tensor is None:
        yield "no gradient", (), b""
    elif tensor.layout in SPARSE_PARTS:
        for part in SPARSE_PARTS[tensor.layout]:
            yield from bits(getattr(tensor.detach(), part)())
    else:
        dense = torch.empty(tensor.numel(), dtype=tensor.dtype)
        dense.view(tensor.shape).copy_(tensor.detach())
        yield str(tensor.dtype), tuple(tensor.shape), dense.view(torch.uint8).numpy().tobytes()


def differentiable(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.requires_grad]


def warned_by(caught: list[warnings.WarningMessage]) -> frozenset[str]:
    return frozenset(str(warning.message) for warning in caught)


def run(op: OpInfo, sample: SampleInput, *, around: AbstractContextManager[object]) -> Outcome | None:
    """Run forward inside `around` and backward after it; None when there is nothing to differentiate."""
    seed_all(0)
    leaves = differentiable((sample.input, sample.args, sample.kwargs))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with around:
            result = op(sample.input, *sample.args, **sample.kwargs)
            outputs = differentiable(sample.output_process_fn_grad(result))
        if not outputs:
            return None
        ahead = [torch.randn_like(output) for output in outputs]
        gradients = torch.autograd.grad(outputs, leaves, ahead, allow_unused=True)
    first, second = (tuple(part for tensor in each for part in bits(tensor)) for each in (outputs, gradients))
    return Outcome(() if op.full_name in UNSTEADY else first, second, warned_by(caught))


def plain_run(op: OpInfo, sample: SampleInput) -> Outcome | str:
    """Return what plain autograd gives, or the rule by which the sample is left out."""
    try:
        first, second = (run(op, sample, around=nullcontext()) for _ in range(2))
    except Exception as error:  # whatever it is, it is PyTorch's
        return f"plain run raises {type(error).__name__}"
    if first is None or second is None:
        return "no gradient"
    return first if same_bits(first, second) else "two plain runs differ"


def same_bits(one: Outcome, other: Outcome) -> bool:
    return (one.outputs, one.gradients) == (other.outputs, other.gradients)


def compare(op: OpInfo, sample: SampleInput, *, store: SavedTensorStore, plain: Outcome) -> str | None:
    """Return how the run under `store` differs from the plain one, or None."""
    try:
        held = run(op, sample, around=store)
    except Exception as error:  # listed with the operator's name, and the sweep goes on
        return f"{type(error).__name__}: {error}"
    if held is None or not same_bits(held, plain):
        return "other bits"
    if held.warned - plain.warned:
        return f"warns {sorted(held.warned - plain.warned)}"
    return f"{store.stats.held_bytes} bytes are still held" if store.stats.held_bytes else None


def sweep(dtype: torch.dtype) -> Sweep:
    """Run every operator that can be differentiated in `dtype`, plain and under each store, in a process of
    its own.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what the database's own samples warn of
    patience._NUM_LOST = 1 << 30  # all operators are called by one line, which would soon be known for no win
    seen, under = Sweep(), stores()
    seen.num_by_stage.update({name: Counter() for name in under})
    for op in op_db:
        if dtype not in op.supported_backward_dtypes("cpu"):
            continue
        seed_all(0)
        for number, sample in enumerate(samples(op, dtype)):
            plain = plain_run(op, sample)
            if isinstance(plain, str):
                seen.left_out[f"{op.full_name}: {plain}"] += 1
                continue
            seen.num_samples[op.full_name] += 1
            for name, store in under.items():
                breach = compare(op, sample, store=store, plain=plain)
                seen.num_by_stage[name].update(store.stats.num_by_stage)
                if breach is not None:
                    seen.breaches.append(f"{op.full_name}, sample {number}, {name}: {breach}")
    return seen


@pytest.fixture(scope="module")
def sweeps() -> dict[torch.dtype, Sweep]:
    """Sweep once, two dtypes at a time; each test below reads one side of what was seen."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        return dict(zip(DTYPES, processes.map(sweep, DTYPES), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_those_of_plain_autograd(dtype: torch.dtype, *, sweeps: dict[torch.dtype, Sweep]) -> None:
    breaches = sweeps[dtype].breaches
    assert not breaches, f"{len(breaches)}: " + "\n".join(breaches[:40])


def test_few_samples_are_left_out(sweeps: dict[torch.dtype, Sweep]) -> None:
    left_out = sum((seen.left_out for seen in sweeps.values()), Counter())
    num_samples = sum(seen.num_samples.total() for seen in sweeps.values())
    assert left_out.total() <= num_samples / 200, left_out
    assert sum(len(seen.num_samples) for seen in sweeps.values()) >= 1200, "the database has 1,300 pairs"
    assert all(
        "nn.functional.rrelu" in sweeps[dtype].num_samples for dtype in (torch.float32, torch.bfloat16)
    )


@pytest.mark.parametrize("codec", [codec.name for codec in DEFAULT_CODECS])
def test_no_codec_stays_idle(codec: str, *, sweeps: dict[torch.dtype, Sweep]) -> None:
    """With its turn first a codec encodes much; left to choose, the default store uses each."""
    # A sample rarely saves two tensors of one length, one of 16 bits whose elements repeat; and none so large
    # that it would pay.
    least, least_chosen = (20, 0) if codec == "tensor-keyed" else (500, 1)
    encoded = {
        name: sum(seen.num_by_stage[name][codec] for seen in sweeps.values()) for name in (codec, "uniquify")
    }
    assert encoded[codec] >= least, encoded
    assert encoded["uniquify"] >= least_chosen, encoded


def test_the_comparison_sees_the_sign_of_a_zero() -> None:
    (op,) = (op for op in op_db if op.full_name == "mul")
    sample = SampleInput(
        torch.tensor([-0.0, 2.0], requires_grad=True), args=(torch.ones(2, requires_grad=True),)
    )
    plain = plain_run(op, sample)
    unsigned = run(op, sample, around=saved_tensors_hooks(Tensor.detach, lambda saved: saved + 0.0))
    assert isinstance(plain, Outcome)
    assert isinstance(unsigned, Outcome)
    assert not same_bits(plain, unsigned)
