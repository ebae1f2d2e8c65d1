"""Tables by a weight under DDP, and FSDP2, which frees it after forward and fills it again in backward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from bench.ranks import run_ranks
from edkm.dkm import dkm
from edkm.fused import fused_dkm
from offload import SavedTensorStore, StaleTensorError, pending
from tests.laws.settings import bits


class Clustered(nn.Module):
    """A linear layer on a clustered weight of 16 bits; a step moves no version counter under FSDP2."""

    def __init__(self, layer: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.randn(128, 128) * 0.02).bfloat16())
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        centroids = torch.linspace(-0.04, 0.04, 8)[:, None]
        weight, _ = self.layer(self.weight, centroids, temperature=1e-4, iterations=2)
        return nn.functional.linear(x, weight).tanh() + x


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp(model: nn.Module) -> nn.Module:
    for each in model:
        fully_shard(each, reshard_after_forward=True)
    return fully_shard(model)


WRAPS = {"ddp": ddp, "fsdp": fsdp}


def gradients(name: str, store: SavedTensorStore | None, *, rank: int) -> list[Tensor]:
    """Return the local gradients of three steps with an optimizer, earlier graphs being kept alive."""
    torch.manual_seed(0)
    model = WRAPS[name](nn.Sequential(Clustered(dkm), Clustered(fused_dkm), Clustered(dkm)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    torch.manual_seed(rank)
    found, losses = [], []
    for _ in range(3):
        x = torch.randn(4, 128).bfloat16()
        if store is None:
            losses.append(model(x).float().square().sum())
        else:
            with store:
                losses.append(model(x).float().square().sum())
            stages = store.stats.num_by_stage
            assert stages.get("tensor-keyed", 0) + stages.get("shared", 0) >= 4, store.report()
        losses[-1].backward(retain_graph=True)
        found += [
            getattr(each.grad, "_local_tensor", each.grad).clone()
            for each in model.parameters()
            if each.grad is not None
        ]
        optimizer.step()
        optimizer.zero_grad()
    return found


def compare(rank: int, name: str) -> None:
    pending.BATCH_BYTES = -1
    for shard in (False, True):
        store = SavedTensorStore(shard=shard, uniquify=True, min_bytes=0)
        plain, ours = gradients(name, None, rank=rank), gradients(name, store, rank=rank)
        assert len(plain) == 9
        assert list(map(bits, plain)) == list(map(bits, ours))
        assert store.stats.held_bytes == 0


@pytest.mark.parametrize("name", WRAPS)
def test_gradients_are_those_of_the_run_without_a_store(name: str) -> None:
    run_ranks(f"{__name__}:compare", name, num_ranks=2)


def step_between(rank: int) -> None:
    """A refill with other weights between forward and backward, which no version tells."""
    pending.BATCH_BYTES = -1
    torch.manual_seed(0)
    model = fsdp(nn.Sequential(Clustered(dkm), Clustered(dkm)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with SavedTensorStore(uniquify=True, min_bytes=0):
        first, second = (model(torch.randn(4, 128).bfloat16()).float().sum() for _ in range(2))
    first.backward()
    optimizer.step()
    with pytest.raises(StaleTensorError, match="keyed by another one"):
        second.backward()


def test_a_step_between_forward_and_backward_is_refused_under_fsdp() -> None:
    # One rank: which tensors are keyed by the weight differs at times from rank to rank, and one that goes on
    # to a collective would wait for the one that was refused before.
    run_ranks(f"{__name__}:step_between", num_ranks=1)
