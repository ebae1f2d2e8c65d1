"""What stands in front of a clustered weight: soft in training, snapped in evaluation."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edkm.chunks import variance
from edkm.config import DKMConfig
from edkm.dkm import as_groups
from edkm.errors import PaletteError
from edkm.fused import fused_through
from edkm.fused_step import table_of
from edkm.init import starting_centroids
from edkm.palette import Palette
from edkm.shards import is_sharded, require_finite, whole

_TABLE_DTYPES: Mapping[str | None, torch.dtype | None] = {
    None: None,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class _Kept:
    """What evaluation made of a weight: of which tensor and memory, in what state."""

    weight: weakref.ref[torch.Tensor]
    storage: weakref.ref[torch.UntypedStorage]
    state: tuple[object, ...]
    made: torch.Tensor

    def is_of(self, weight: torch.Tensor, state: tuple[object, ...]) -> bool:
        # Themselves: an address, or an `id`, is soon another's.
        return self.weight() is weight and self.storage() is weight.untyped_storage() and self.state == state


class ClusteredWeight(nn.Module):
    """A parametrization: a dense weight in, the weight that the model runs on out.

    Its state is the centroids and the count of steps; only `commit` and `load_state_dict` change it. In
    evaluation the snapped weight is kept for one tensor, until its version or its memory is another,
    training goes on, or the state changes. A write that PyTorch does not count, such as `weight.data.copy_`
    or a fused optimizer's, is not seen: call `model.eval()` after it. To hash the weight at each read
    instead would cost half of a token's time.

    Arguments:
        weight: the dense weight, `[out, in]`.
        bits: of an index.
        config: the rest.
        trained_soft: cluster it in training; otherwise it trains dense and is snapped by k-means in
            evaluation.
        name: of the weight, for errors.
    """

    centroids: torch.Tensor
    num_steps_done: torch.Tensor

    def __init__(
        self, weight: torch.Tensor, *, bits: int, config: DKMConfig, trained_soft: bool, name: str
    ) -> None:
        super().__init__()
        self.name = name
        self.bits = bits
        self.config = config
        self.trained_soft = trained_soft
        self.forced_soft: bool | None = None
        self.num_groups = math.gcd(config.num_groups, weight.shape[0]) if trained_soft else 1
        self._pending: torch.Tensor | None = None
        self._kept: _Kept | None = None
        if trained_soft:
            self.register_buffer("centroids", self._k_means(weight))
            self.register_buffer("num_steps_done", torch.zeros((), dtype=torch.int64, device=weight.device))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight to run on; the same bits however often it is read.

        Raises:
            PaletteError: the weight is sharded, as FSDP has it outside of a forward pass: a gather here would
                wait for ranks that may not read it; or it is to be snapped and has become NaN or infinite.
        """
        if is_sharded(weight):
            raise PaletteError(
                f"cannot read a clustered weight of shape {list(weight.shape)}: this rank holds a shard; "
                "call unshard() of the fully_shard module around it on every rank, read, and reshard()"
            )
        soft = self.training if self.forced_soft is None else self.forced_soft
        if not soft:
            snapped: torch.Tensor = self._keep(weight, lambda: self.palette(weight).decode())
            return snapped
        if not self.trained_soft:
            return weight
        if self.training or torch.is_grad_enabled():
            return self._cluster(weight)
        clustered: torch.Tensor = self._keep(weight, lambda: self._cluster(weight))
        return clustered

    def palette(self, weight: torch.Tensor) -> Palette:
        """The dense weight, snapped; where it is sharded, all ranks call this and get the same.

        Raises:
            PaletteError: it is NaN or infinite somewhere, on any rank.
        """
        require_finite(weight, attempt=f"palettize {self.name}")
        centroids = self.centroids if self.trained_soft else self._k_means(weight)
        return Palette.snap(whole(weight), centroids)

    def commit(self) -> None:
        """Take the centroids of the first training pass since the last commit over into the next step."""
        self._kept = None
        if not self.trained_soft:
            return
        self.num_steps_done += 1
        if self._pending is not None:
            self.centroids.copy_(self._pending)
            self._pending = None

    def train(self, mode: bool = True) -> ClusteredWeight:  # noqa: FBT001 - torch's signature
        """Switch between training and evaluation; what was kept for evaluation goes."""
        # Some writes leave no trace in a version: fused optimizers, for one.
        self._kept = None
        return super().train(mode)

    def _cluster(self, weight: torch.Tensor) -> torch.Tensor:
        wide, table_dtype = self.centroids.dtype, _TABLE_DTYPES[self.config.table_dtype]
        table = table_of(weight.detach(), as_groups(self.centroids), table_dtype=table_dtype)
        # Counted once for both; but what is read through a cast is not all of a wider weight.
        if table is not None and table.dtype == weight.dtype:
            spread = table.variance().to(wide)
        else:
            spread = variance(weight.detach(), wide)
        spread = spread.clamp(min=torch.finfo(wide).tiny)
        clustered, centroids = fused_through(
            weight,
            self.centroids,
            temperature=spread * self.config.temperature_at(int(self.num_steps_done)),
            iterations=self.config.iterations,
            epsilon=self.config.epsilon * float(spread.sqrt()) if self.config.epsilon else 0.0,
            table_dtype=table_dtype,
            table=table,
        )
        if self.training and self._pending is None:
            self._pending = centroids.detach()
        return clustered

    def _keep(self, weight: torch.Tensor, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        if torch.compiler.is_compiling():  # what is kept, and of what, is no matter of a graph
            kept: torch.Tensor = torch.compiler.disable(self._look_up)(weight, compute)  # type: ignore[no-untyped-call]
            return kept
        return self._look_up(weight, compute)

    def _look_up(self, weight: torch.Tensor, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        state = (self.forced_soft, weight.data_ptr(), weight._version, weight.dtype, weight.device)
        kept = self._kept
        if kept is None or not kept.is_of(weight, state):
            # Made in inference mode it could not be used outside of it.
            with torch.inference_mode(mode=False), torch.no_grad():
                storage = weakref.ref(weight.untyped_storage())
                kept = self._kept = _Kept(weakref.ref(weight), storage, state, compute())
        return kept.made

    def _k_means(self, weight: torch.Tensor) -> torch.Tensor:
        return starting_centroids(
            weight,
            num_centroids=1 << self.bits,
            vector_length=self.config.vector_length,
            num_groups=self.num_groups,
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ClusteredWeight:  # noqa: FBT001
        # `model.to(torch.bfloat16)` takes buffers along; centroids stay as wide as they are summed.
        self._kept = self._pending = None
        exact = self.centroids if self.trained_soft else None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if exact is not None and self.centroids.dtype != exact.dtype:
            self.centroids = exact.to(self.centroids.device)
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._kept = self._pending = None
        super()._load_from_state_dict(*arguments)
