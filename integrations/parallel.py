"""How ranks train one model together: each holds all of it, or a part (FSDP2)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from integrations.ranks import Ranks


class Parallel(ABC):
    """A model on its ranks; after `finish` each gradient is the sum over all of them."""

    ranks: Ranks

    @abstractmethod
    def computing(self) -> AbstractContextManager[object]:
        """What a forward pass of training runs in."""

    @abstractmethod
    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        """Add the gradients of a batch; `is_last` is the last one of its step."""

    @abstractmethod
    def finish(self) -> None:
        """Wait for the gradients of the step's batches."""


class Replicated(Parallel):
    """Every rank holds the model (data parallel, as DDP); one rank alone is this too.

    The sum of a gradient begins when backward, in its last batch, has it and those that come before it in one
    order of all ranks, and runs beside the rest of backward.

    It is not DistributedDataParallel itself. That lays its buckets out anew after the first step, or, told to
    find unused parameters, warns when it finds none; and the last bits of a sum over more than two ranks
    depend on its place in a bucket, so that a resumed run would not go on to the same bits.

    Arguments:
        model: the same on every rank; its parameters get hooks.
        ranks: who shares the work.
        autocast: compute in bf16 on fp32 weights.
    """

    def __init__(self, model: nn.Module, *, ranks: Ranks, autocast: bool = False) -> None:
        self.ranks = ranks
        self._device = next(model.parameters()).device.type
        self._autocast = autocast
        # Backward reaches the last ones first.
        self._order = [each for each in reversed(list(model.parameters())) if each.requires_grad]
        self._ready: set[nn.Parameter] = set()
        self._works: list[dist.Work] = []
        self._is_last = False
        if ranks.num_ranks > 1:
            for parameter in self._order:
                parameter.register_post_accumulate_grad_hook(self._note)  # type: ignore[no-untyped-call]

    def computing(self) -> AbstractContextManager[object]:
        """Autocast to bf16, where asked for."""
        return torch.autocast(self._device, dtype=torch.bfloat16) if self._autocast else nullcontext()

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        """Add a batch's gradients up on this rank; in the last batch start to add up those of all ranks."""
        self._is_last = is_last
        loss.backward()  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """Wait for the sums; a parameter that no rank's rows reached stays without gradient."""
        if self.ranks.num_ranks == 1:
            return
        has_gradient = torch.tensor([each.grad is not None for each in self._order], dtype=torch.uint8)
        for parameter in self._order[len(self._works) :]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self._start(parameter)
        dist.all_reduce(has_gradient, op=dist.ReduceOp.MAX)
        for work in self._works:
            work.wait()
        for parameter, has in zip(self._order, has_gradient.tolist(), strict=True):
            if not has:
                parameter.grad = None
        self._works.clear()
        self._ready.clear()

    def _note(self, parameter: torch.Tensor) -> None:
        if not self._is_last:
            return
        assert isinstance(parameter, nn.Parameter)
        self._ready.add(parameter)
        # In one order: ranks whose rows reach different parameters must not add up unlike ones.
        for following in self._order[len(self._works) :]:
            if following not in self._ready:
                break
            self._start(following)

    def _start(self, parameter: nn.Parameter) -> None:
        work = dist.all_reduce(parameter.grad, async_op=True)
        assert work is not None
        self._works.append(work)


class Sharded(Parallel):
    """Each rank holds a part of every weight and gathers a layer while it runs (FSDP2).

    Gradients are reduced in fp32, after every batch: kept back until the last one, as data parallel does,
    they would be held whole.

    Arguments:
        model: the same on every rank, clustered already; its parameters become DTensors.
        ranks: who shares the work, more than one.
        dtype: to gather and compute in; None is the weights' own.
    """

    def __init__(self, model: nn.Module, *, ranks: Ranks, dtype: torch.dtype | None = None) -> None:
        self.ranks = ranks
        mesh = init_device_mesh(next(model.parameters()).device.type, (ranks.num_ranks,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for part in [*_layers(model), model]:
            # Resharded after forward, the root too: outside of it all parameters are shards.
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
            assert isinstance(part, FSDPModule)
            # A sum, not a mean: the loss is normalised by the tokens of all ranks already.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(enable=True)

    def computing(self) -> AbstractContextManager[object]:
        """The policy is FSDP's."""
        return nullcontext()

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        """Add a batch's gradients up over all ranks."""
        loss.backward()  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """FSDP has waited at the end of backward."""


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The members of each outermost list of modules: a decoder's layers."""
    for child in module.children():
        # Exactly a list: a parametrization is a kind of one.
        if type(child) is nn.ModuleList:
            yield from child
        else:
            yield from _layers(child)
