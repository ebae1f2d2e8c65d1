"""DDP, FSDP2 and tensor parallel under a store that shares: gradients as without one."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from bench.ranks import run_ranks
from offload import SavedTensorStore, StaleTensorError, StoreError
from offload.sharding.shared_memory import SharedMemory
from tests.offload.sharding.in_turn import run_in_turn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.gelu(self.first(x)))


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp(model: nn.Module) -> nn.Module:
    return fully_shard(model)


def fsdp1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def tensor_parallel(model: nn.Module) -> nn.Module:
    plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": ddp,
    "fsdp": fsdp,
    "fsdp1": fsdp1,
    "tensor_parallel": tensor_parallel,
}


def gradients(
    name: str, store: SavedTensorStore | None, *, seed: int, autocast: bool, recompute: bool
) -> list[Tensor]:
    """Return the local gradients after three steps, two of them accumulated."""
    torch.manual_seed(0)
    model = WRAPS[name](Net())
    torch.manual_seed(seed)
    for number in range(3):
        x = torch.randn(64, 64)
        if number == 0:
            model.zero_grad()

        def forward(x: Tensor = x) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                hidden = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
                return hidden.square().sum()

        if store is None:
            loss = forward()
        else:
            with store:
                loss = forward()
            dist.barrier()
            store.report()
        loss.backward()
    # FSDP1 leaves a rank without a gradient of a parameter of which it holds nothing.
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert found
    return [getattr(gradient, "_local_tensor", gradient) for gradient in found]


def compare(rank: int, name: str) -> None:
    for shard, autocast, recompute in product(("shared-memory", "all-gather"), (False, True), (False, True)):
        store = SavedTensorStore(shard=shard, uniquify=True, min_bytes=0)
        seed = 1 if name == "tensor_parallel" else rank
        options = {"seed": seed, "autocast": autocast, "recompute": recompute}
        plain = gradients(name, None, **options)
        ours = gradients(name, store, **options)
        assert all(map(torch.equal, plain, ours)), options
        assert store.stats.held_bytes == 0
        if not recompute and (autocast or name == "tensor_parallel"):
            assert store.stats.num_by_stage.get("shared", 0) > 0, store.report()


@pytest.mark.parametrize("name", WRAPS)
def test_gradients_are_those_of_the_run_without_a_store(name: str) -> None:
    run_ranks(f"{__name__}:compare", name, num_ranks=2)


def change_in_place(rank: int) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    changes = [lambda x: x.mul_(3), lambda x: x.detach().mul_(3), lambda x: x.view(-1).mul_(3)]
    for change in changes:
        for uniquify in (False, True):
            weight = distribute_tensor(torch.randn(64, 64), mesh, [Shard(0)]).requires_grad_()
            x = distribute_tensor(torch.randn(64, 64), mesh, [Shard(0)])
            with SavedTensorStore(shard=True, uniquify=uniquify, min_bytes=0):
                loss = (weight * x).sum()
            with torch.no_grad():
                change(x)
            with pytest.raises(StaleTensorError, match="DTensor"):
                loss.backward()


def share_what_is_not_hashed(rank: int) -> None:
    """A codec always wins on it and no other save of this rank is equal, but another rank's is."""
    store = SavedTensorStore(shard="shared-memory", uniquify=True, min_bytes=0)
    for number in range(14):
        torch.manual_seed(number)
        x, factor = torch.ones(64, 256, requires_grad=True), torch.randn(64, 256).bfloat16().float()
        wanted = factor.clone()
        with store:
            y = x * factor
            del factor
        dist.barrier()
        store.report()
        dist.barrier()
        assert store.stats.num_by_stage == {"shared": 1}, number
        y.sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad, wanted)


def join_nowhere(rank: int) -> None:
    """A store that cannot join leaves no hooks behind."""
    with (
        pytest.raises(StoreError, match="needs the folder"),
        SavedTensorStore(shard=SharedMemory(directory="/nowhere")),
    ):
        pass
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_what_cannot_be_given_back_is_refused_and_who_cannot_join_is_told() -> None:
    run_in_turn(__name__, "change_in_place", "share_what_is_not_hashed", "join_nowhere", num_ranks=2)
