"""What a LLaMA step's ranks hold under DDP, FSDP2 and tensor parallel, and which tensors they share: the part
of `python -m bench.step` behind `--ranks`.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from bench.agreement import Timed
from bench.llama import LlamaStep, plain_bytes
from bench.ranks import run_ranks
from offload import SavedTensorStore
from offload.sharding.all_gather import AllGather
from offload.sharding.base import Sharding
from offload.sharding.local import Local
from offload.sharding.shared_memory import SharedMemory
from offload.stats import Row

_NUM_STEPS = 3
_NUM_TIMED = 15
_TIMEOUT_SECONDS = 900.0
_NUM_LINES = 12
_POLICIES: Mapping[str, Callable[[], Sharding]] = {
    "store": Local,
    "shared memory": SharedMemory,
    "all-gather": AllGather,
}


def _ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def _fsdp(model: nn.Module) -> nn.Module:
    for layer in model.get_submodule("model.layers").children():
        fully_shard(layer)
    return fully_shard(model)


def _tensor_parallel(model: nn.Module) -> nn.Module:
    split = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    joined = ("self_attn.o_proj", "mlp.down_proj")
    plan = {f"model.layers.*.{name}": ColwiseParallel() for name in split}
    plan |= {f"model.layers.*.{name}": RowwiseParallel() for name in joined}
    return parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)


WRAPS: Mapping[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": _ddp,
    "FSDP2": _fsdp,
    "tensor parallel": _tensor_parallel,
}
"""Of these the first two give each rank a batch of its own, the last gives all ranks the same."""


def measure_parallel(dtype: str, *, num_ranks: int) -> dict[str, Any]:
    """Return for each wrapper what the group holds each way, in bytes, the lines of code whose tensors are
    shared, and the part of a step that it takes to agree on them.
    """
    result = {}
    for name in WRAPS:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (name, dtype, folder)
            run_ranks(
                "bench.step_ranks:measure_rank",
                *arguments,
                num_ranks=num_ranks,
                timeout_seconds=_TIMEOUT_SECONDS,
            )
            ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(num_ranks)]
        result[name] = {
            "group_held_bytes": {
                way: sum(rank["held_bytes"][way] for rank in ranks) for way in ranks[0]["held_bytes"]
            },
            "bit_identical": all(rank["bit_identical"] for rank in ranks),
            "agreement_over_step": {
                way: round(max(rank["agreement_over_step"][way] for rank in ranks), 5) for way in _POLICIES
            },
            "shared": ranks[0]["shared"],
        }
    return result


def measure_rank(rank: int, name: str, dtype: str, folder: str) -> None:
    """Write this rank's bytes each way, held at the end of forward, to `folder`."""
    torch.set_num_threads(1)
    seed = 0 if name == "tensor parallel" else rank
    llama = LlamaStep(dtype, wrap=WRAPS[name], seed=seed)
    for _ in range(2):  # after the first step DDP parts its buckets anew, and sums in another order
        llama.step(nullcontext()).backward()
    plain = llama.gradients()
    saved = plain_bytes(llama)
    held = {"no store": saved["storage"], "save_on_cpu": saved["saved"]}
    is_identical, shared, agreement = True, [], {}
    for way, make in _POLICIES.items():
        policy = Timed(make())
        store = SavedTensorStore(uniquify=True, shard=policy)
        held[way], rows = _held_bytes(llama, store)
        is_identical &= all(map(torch.equal, llama.gradients(), plain))
        shared = rows or shared
        agreement[way] = _agreement_over_step(llama, store, policy)
    result = {
        "held_bytes": held,
        "bit_identical": is_identical,
        "shared": shared,
        "agreement_over_step": agreement,
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(result))


def _held_bytes(llama: LlamaStep, store: SavedTensorStore) -> tuple[int, list[str]]:
    """Return what this rank holds once all have told what they hold, and the lines that share most."""
    loss: Tensor
    for _ in range(_NUM_STEPS):
        loss = llama.step(store)
        for _ in range(2):
            dist.barrier()
            stats = store.stats
        dist.barrier()
        rows = [row for row in store.rows() if "shared" in row.num_by_stage]
        loss.backward()
    rows.sort(key=lambda row: row.saved_bytes, reverse=True)
    return stats.held_bytes, [_line(row) for row in rows[:_NUM_LINES]]


def _agreement_over_step(llama: LlamaStep, store: SavedTensorStore, policy: Timed) -> float:
    """Return the median share of a step's processor time that goes into finding what ranks agree on."""
    shares = []
    for _ in range(_NUM_TIMED):
        policy.seconds, began = 0.0, time.process_time()
        llama.step(store).backward()
        shares.append(policy.seconds / (time.process_time() - began))
        dist.barrier()
    return statistics.median(shares)


def _line(row: Row) -> str:
    return f"{row.num_by_stage['shared']} x {list(row.shape)} {row.dtype} at {row.site}"


def table(result: dict[str, Any]) -> str:
    """Return the result as lines for people."""
    ways = ("no store", "save_on_cpu", *_POLICIES)
    lines = [f"{'MiB of the group':18}" + "".join(f"{way:>15}" for way in ways)]
    for name, row in result.items():
        lines.append(f"{name:18}" + "".join(f"{row['group_held_bytes'][way] / 2**20:>15.1f}" for way in ways))
        shares = ", ".join(f"{way} {share:.2%}" for way, share in row["agreement_over_step"].items())
        lines.append(f"    agreement, of the step's processor time: {shares}")
        lines += [f"    {line}" for line in row["shared"]]
    return "\n".join(lines)
