"""A clustered model: what it computes, and that only a step changes its state."""

import copy
import io
import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from edkm import DKMConfig, PaletteError, cluster, dkm, palettize
from tests.edkm.models import TinyLM, loss_of, optimizer_of, tokens, train

CONFIG = DKMConfig(bits=3, embedding_bits=4, num_steps=6)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_training_runs_on_what_the_layer_gives() -> None:
    linear = nn.Linear(12, 8, bias=False)
    weight = linear.weight
    cluster(linear, CONFIG)
    parametrization = linear.parametrizations["weight"][0]
    temperature = CONFIG.temperature * weight.detach().var(correction=0)
    expected, _ = dkm(
        weight, parametrization.centroids, temperature=temperature, iterations=CONFIG.iterations
    )
    torch.testing.assert_close(linear.weight, expected)
    [gradient] = torch.autograd.grad(linear.weight.square().sum(), weight)
    [wanted] = torch.autograd.grad(expected.square().sum(), weight)
    torch.testing.assert_close(gradient, wanted)


def test_parameters_stay_the_same_objects() -> None:
    model = TinyLM()
    before = {id(parameter) for parameter in model.parameters()}
    cluster(model, CONFIG)
    assert {id(parameter) for parameter in model.parameters()} == before


def test_tied_modules_run_on_one_weight() -> None:
    model = TinyLM()
    cluster(model, CONFIG)
    for _ in range(2):
        assert torch.equal(model.embed_tokens.weight, model.lm_head.weight)
        model.eval()
    assert model.lm_head.weight.unique().numel() <= 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_weights_keep_their_dtype_and_centroids_their_width(dtype: torch.dtype) -> None:
    model = TinyLM().to(dtype)
    clustering = cluster(model, CONFIG)
    exact = model.layers[0].o_proj.parametrizations["weight"][0].centroids.clone()
    loss_of(model, tokens()).backward()
    clustering.step()
    assert model.layers[0].o_proj.weight.dtype == model.eval().layers[0].o_proj.weight.dtype == dtype
    centroids = model.to(torch.bfloat16).layers[0].o_proj.parametrizations["weight"][0].centroids
    assert centroids.dtype == exact.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_reading_changes_no_state() -> None:
    """Reads, evaluation and recomputation, anywhere between the steps, leave training as it was."""
    batches = [tokens() for _ in range(3)]
    plain = TinyLM()
    noisy = copy.deepcopy(plain)
    first = cluster(plain, CONFIG)
    train(plain, first, optimizer=optimizer_of(first), batches=batches)

    clustering = cluster(noisy, CONFIG)
    optimizer = optimizer_of(clustering)

    def look() -> None:
        before = state_of(noisy)
        for mode in (True, False, True):
            noisy.train(mode)
            with torch.no_grad():
                noisy(tokens())
            noisy(tokens()).sum()
            assert noisy.layers[0].up_proj.weight.dtype == torch.float32
        with clustering.soft(), torch.inference_mode():
            noisy(tokens())
        with clustering.snapped():
            noisy(tokens())
        clustering.num_dead_centroids()
        assert_same(before, state_of(noisy))

    for batch in batches:
        loss = loss_of(noisy, batch)
        look()
        loss.backward()
        look()
        clustering.clip_grad_norm_(1.0)
        optimizer.step()
        look()
        optimizer.zero_grad()
        clustering.step()
    assert_same(state_of(plain), state_of(noisy))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_step_is_the_step_without_bit_for_bit(reentrant: bool) -> None:
    class Checkpointed(TinyLM):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            x = self.embed_tokens(batch)
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            return self.lm_head(x) * self.scale

    batches = [tokens() for _ in range(4)]
    plain, saved = TinyLM(), Checkpointed()
    saved.load_state_dict(plain.state_dict())
    results = []
    for model in (plain, saved):
        clustering = cluster(model, CONFIG)
        losses = train(model, clustering, optimizer=optimizer_of(clustering), batches=batches)
        results.append((losses, state_of(model)))
    assert results[0][0] == results[1][0]
    assert_same(results[0][1], results[1][1])


def test_in_evaluation_the_snapped_weight_is_kept_until_the_weight_changes() -> None:
    model = TinyLM()
    clustering = cluster(model, CONFIG)
    linear = model.layers[0].o_proj
    original = linear.parametrizations["weight"].original
    model.eval()
    first = linear.weight
    assert linear.weight is first
    assert first.unique().numel() <= 8
    with torch.no_grad():
        original.mul_(2)
    assert linear.weight is not first
    second = linear.weight
    original.data = original.data * 2
    assert linear.weight is not second
    third = linear.weight
    original.data.mul_(0.5)  # no version counts this
    assert linear.weight is third
    model.train()
    model.eval()
    assert linear.weight is not third
    fourth = linear.weight
    clustering.step()
    assert linear.weight is not fourth


def test_a_fresh_weight_at_the_address_of_the_last_one_is_another_weight() -> None:
    linear = nn.Linear(64, 64, bias=False)
    cluster(linear, DKMConfig(bits=2))
    linear.eval()
    first, last, x = torch.randn(64, 64), torch.randn(64, 64), torch.randn(2, 64)

    def on_a_fresh_weight(share: float) -> torch.Tensor:
        weight = torch.lerp(first, last, share)
        return functional_call(linear, {"parametrizations.weight.original": weight}, (x,))

    with torch.no_grad():
        found = [on_a_fresh_weight(share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
        for share, each in zip((0.0, 0.25, 0.5, 0.75, 1.0), found, strict=True):
            linear.eval()
            assert torch.equal(each, on_a_fresh_weight(share))


def test_other_memory_at_the_address_of_the_last_is_another_weight() -> None:
    linear = nn.Linear(64, 64, bias=False)
    cluster(linear, DKMConfig(bits=2))
    linear.eval()
    original = linear.parametrizations["weight"].original
    found = []
    for scale in (1.0, 2.0, 3.0, 4.0):
        original.data = torch.empty(0)
        original.data = torch.full((64, 64), scale)
        found.append(linear.weight)
    assert all(each is not other for each, other in itertools.pairwise(found))


def test_a_compiled_model_evaluates_as_it_does_without() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    clustering = cluster(model, DKMConfig(bits=3))
    model.eval()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(2, 16)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(compiled(x), model(x))
            with clustering.soft():
                assert torch.equal(compiled(x), model(x))
            model[0].parametrizations["weight"].original.mul_(2)


def test_what_is_kept_in_inference_mode_can_be_used_outside() -> None:
    model = TinyLM().eval()
    cluster(model, CONFIG)
    with torch.inference_mode():
        model(tokens())
    x = torch.randn(2, 3, 16, requires_grad=True)
    model.layers[0](x).sum().backward()
    assert x.grad is not None


def test_state_is_tensors_only_and_training_resumes_with_the_same_losses() -> None:
    batches = [tokens() for _ in range(6)]
    model = TinyLM()
    clustering = cluster(model, CONFIG)
    optimizer = optimizer_of(clustering)
    train(model, clustering, optimizer=optimizer, batches=batches[:3])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = train(model, clustering, optimizer=optimizer, batches=batches[3:])

    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state["model"].values())
    resumed = TinyLM()
    again = cluster(resumed, CONFIG)
    loss_of(resumed, tokens())  # what it computed before must not linger
    optimizer = optimizer_of(again)
    resumed.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    assert train(resumed, again, optimizer=optimizer, batches=batches[3:]) == expected
    assert_same(state_of(model), state_of(resumed))


def test_copies_train_apart_and_alike() -> None:
    batches = [tokens() for _ in range(3)]
    model = TinyLM()
    clustering = cluster(model, CONFIG)
    train(model, clustering, optimizer=optimizer_of(clustering), batches=batches)
    before = state_of(model)
    twin, handle = copy.deepcopy((model, clustering))
    losses = train(twin, handle, optimizer=optimizer_of(handle), batches=batches)
    assert_same(before, state_of(model))
    assert train(model, clustering, optimizer=optimizer_of(clustering), batches=batches) == losses
    alone = copy.deepcopy(model)
    assert torch.equal(palettize(alone.eval())(batches[0]), model.eval()(batches[0]))


def test_clustering_twice_is_refused() -> None:
    model = TinyLM()
    cluster(model, CONFIG)
    with pytest.raises(PaletteError, match="clustered already"):
        cluster(model, CONFIG)


def test_save_pretrained_refuses_while_a_weight_is_on_a_palette() -> None:
    class Hub(TinyLM):
        def save_pretrained(self, directory: str) -> str:
            return f"written to {directory}"

    model = Hub()
    part = nn.ModuleDict({"model": model})
    cluster(part, CONFIG)
    for changed in (part, palettize(part)):
        for saved in (changed["model"], copy.deepcopy(changed)["model"]):
            with pytest.raises(PaletteError, match="save_pretrained of a clustered Hub would write names"):
                saved.save_pretrained("x")
    for name, module in list(model.named_modules()):
        if hasattr(module, "palette"):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Identity())
    assert model.save_pretrained("x") == "written to x"
