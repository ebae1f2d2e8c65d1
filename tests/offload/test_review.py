"""What an adversary tried: each was wrong once."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from offload import SavedTensorStore, pending
from offload.codecs.base import Block, Codec, Payload
from offload.codecs.index_list import IndexLists
from offload.codecs.raw import Raw


def test_a_subnormal_does_not_depend_on_the_readers_float_mode() -> None:
    weight = torch.ones(4096, dtype=torch.float64, requires_grad=True)
    tensor = (torch.rand(4096) * 1e-39).double()
    with SavedTensorStore(uniquify=True, min_bytes=4096):
        product = weight * tensor
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        product.sum().backward()
    finally:
        torch.set_flush_denormal(False)
    assert weight.grad is not None
    assert torch.equal(weight.grad, tensor)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_thread_without_python_frames_may_save() -> None:
    @torch.jit.script
    def square(x: Tensor) -> Tensor:
        return x * x

    @torch.jit.script
    def forked(x: Tensor) -> Tensor:
        return torch.jit.wait(torch.jit.fork(square, x))

    x = torch.randn(64, 64, requires_grad=True)
    with SavedTensorStore(min_bytes=4096):
        y = forked(x)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * x.detach())


def test_a_view_of_no_width_is_saved_beside_an_index_list() -> None:
    x, weight = torch.randint(0, 3, (64, 64)).float(), torch.randn(64, 64, requires_grad=True)
    empty, other = torch.randn(64, 64)[:, :0], torch.randn(64, 0, requires_grad=True)
    with SavedTensorStore(uniquify=True, dedupe=False, min_bytes=4096):
        product, nothing = x * weight, empty * other
    (product.sum() + nothing.sum()).backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, x)


class Shrunk(torch.autograd.Function):
    """Saves a tensor without reading it."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, weight: Tensor, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return weight.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        (tensor,) = ctx.saved_tensors
        return grad * tensor, None


@pytest.mark.parametrize("left_bytes", [0, 16384])
@pytest.mark.parametrize("options", [{"dedupe": False}, {"uniquify": True}], ids=str)
def test_a_storage_shrunk_before_the_save_is_left_as_it_is(left_bytes: int, options: dict[str, bool]) -> None:
    tensor = torch.ones(8192)
    tensor.untyped_storage().resize_(left_bytes)
    weight = torch.ones(8192, requires_grad=True)
    with SavedTensorStore(min_bytes=0, **options):
        kept = Shrunk.apply(weight, tensor)
    assert tensor.untyped_storage().nbytes() == left_bytes
    tensor.untyped_storage().resize_(32768)
    tensor.data.fill_(3)
    kept.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full((8192,), 3.0))


def test_a_mode_entered_after_the_save_has_no_part_in_settling() -> None:
    weight, mask = torch.randn(4096, requires_grad=True), torch.ones(4096)
    store = SavedTensorStore(uniquify=True, min_bytes=4096)
    with store:
        product = weight * mask
        with FakeTensorMode():
            assert sum(store.stats.num_by_stage.values()) == 1
    product.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, mask)


class Failing(Codec):
    """Fails at its second block."""

    name = "failing"

    def __init__(self) -> None:
        self.num_calls = 0

    def estimate_bytes(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> int | None:
        return 0

    def encode(self, block: Block, *, limit_bytes: int, lists: IndexLists) -> Payload | None:
        self.num_calls += 1
        if self.num_calls == 2:
            raise RuntimeError("no memory for a table")
        return Raw().encode(block, limit_bytes=1 << 62, lists=lists)


def test_a_codec_that_fails_leaves_a_store_that_works() -> None:
    store = SavedTensorStore(uniquify=[Failing()], min_bytes=4096)
    weight, tensors = torch.ones(4096, requires_grad=True), torch.randn(5, 4096).unbind()
    tensors = [tensor.clone() for tensor in tensors]
    with pytest.raises(RuntimeError, match="no memory for a table"), store:
        total = sum(weight * tensor for tensor in tensors)
    stats = store.stats
    assert sum(stats.num_by_stage.values()) == stats.num_saved
    (gradient,) = torch.autograd.grad(total.sum(), weight)
    (plain,) = torch.autograd.grad(sum(weight * tensor for tensor in tensors).sum(), weight)
    assert torch.equal(gradient, plain)
    del total
    assert store.stats.held_bytes == 0


def test_dead_saves_do_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending, "BATCH_BYTES", 10 * pending.LEAST_BYTES)
    weight = nn.Parameter(torch.ones(()))
    with SavedTensorStore(min_bytes=0) as store:
        for _ in range(100):
            (weight * torch.ones(()) * torch.ones(())).backward()
        assert store._settler.queue.num_saves <= 12
