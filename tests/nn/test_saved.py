# SPDX-License-Identifier: Apache-2.0
"""What waits for the backward pass of blocks in 8 bits: its numbers, its bytes, and when the hooks are in force."""

from __future__ import annotations

import copy
import gc
import io
import math
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import AutoConfig, AutoModelForCausalLM

from lowbits.analysis import measure_memory, predict_memory
from lowbits.errors import ConversionError, SpecError
from lowbits.formats import E4M3, INT4, INT8, UINT8
from lowbits.methods import Position
from lowbits.methods.gaussws import GaussWS
from lowbits.nn import Keep, QuantizedLinear, Recipe, _saved, convert_, high_precision, listening_to_saved, set_phase_
from lowbits.quantizers import Asymmetric, PerBlock, PerRow, QuantSpec, Rounding
from lowbits.recipes import named

SPEC = QuantSpec(INT8, PerBlock(128))
ALONE = Recipe(saved_activations=SPEC)
WIDTH = 64


class Block(nn.Module):
    """x + silu(x W)^2, with what tests put between."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.between = nn.Linear(WIDTH, WIDTH, bias=False), None

    def forward(self, x: Tensor) -> Tensor:
        h = silu(self.layer(x))
        return x + (h * h if self.between is None else self.between(h))


class Stack(nn.Module):
    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class WithHead(Stack):
    """Blocks and head in one forward pass, as people write them."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(super().forward(x)).exp()


def converted(model: nn.Module, recipe: Recipe = ALONE) -> nn.Module:
    convert_(model, recipe, verbose=False)
    return model


def llama(recipe: Recipe | None = None, attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=WIDTH, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
    return model if recipe is None else converted(model, recipe)


IDS = torch.arange(4 * 32).view(4, 32) % 61


def loss_of(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def gradients(model: nn.Module, loss: Callable[[nn.Module], Tensor] = loss_of) -> Tensor:
    model.zero_grad()
    loss(model).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def error(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


def in_eight_bits(x: Tensor) -> Tensor:
    """Each 128 elements of memory in turn, in float64."""
    groups = x.detach().double().reshape(-1, 128)
    scale = groups.abs().amax(1, keepdim=True) / 127
    return ((groups / scale).round() * scale).view(x.shape)


def hooks_in_force() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


# --- numbers --------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_what_was_saved() -> None:
    model = converted(Stack(1))
    w = model.blocks[0].layer.weight
    x, g = torch.randn(2, 16, WIDTH, requires_grad=True), torch.randn(2, 16, WIDTH)
    y = model(x * 1)
    y.backward(g)
    u = x.double() @ w.double().t()
    h = u * torch.sigmoid(u)
    torch.testing.assert_close(y.double(), x + h * h, rtol=1e-4, atol=1e-5)
    # silu keeps its input, the square its factor, the layer x.
    u8, h8, x8 = (in_eight_bits(t.float()) for t in (u, h, x))
    s = torch.sigmoid(u8)
    du = 2 * h8 * g * (s + u8 * s * (1 - s))
    torch.testing.assert_close(w.grad.double(), du.flatten(0, 1).t() @ x8.flatten(0, 1), rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(x.grad.double(), g + du @ w.double(), rtol=1e-3, atol=2e-4)
    assert error(in_eight_bits(x), x.double()) > 1e-3  # so the test sees it


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_forward_pass_is_the_same_and_the_gradient_almost(attention: str, autocast: bool) -> None:
    plain, saved = llama(named("w8a8"), attention), llama(named("w8a8_saved8"), attention)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(loss_of(plain), loss_of(saved))
        exact, found = gradients(plain), gradients(saved)
    assert 1e-5 < error(found, exact) < 0.02


def test_masks_keep_their_infinities() -> None:
    mask = torch.full((WIDTH, WIDTH), -math.inf).triu(1)

    def loss(model: nn.Module) -> Tensor:
        model.blocks[0].between = lambda h: (h @ h.transpose(-1, -2) + mask * 1).softmax(-1) * (mask * 1).exp() @ h
        return model(torch.ones(1, WIDTH, WIDTH).cumsum(1) / 50).square().mean()

    model = Stack(1)
    exact = gradients(model, loss)
    assert error(gradients(converted(model), loss), exact) < 0.05


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_sparse_and_nested_tensors_are_kept_as_they_are() -> None:
    def between(h: Tensor) -> Tensor:
        nested = torch.nested.as_nested_tensor([h[0, :3], h[0, :5]])
        return torch.sparse.mm(torch.eye(WIDTH).to_sparse(), h[0]) + (nested * nested).to_padded_tensor(0.0).sum()

    def loss(model: nn.Module) -> Tensor:
        model.blocks[0].between = between
        return model(torch.ones(1, WIDTH, WIDTH).cumsum(1) / 50).square().mean()

    model = Stack(1)
    exact = gradients(model, loss)
    assert error(gradients(converted(model), loss), exact) < 0.05


def views() -> dict[str, Tensor]:
    whole = torch.randn(8, 6, WIDTH)
    return {
        "contiguous": whole, "turned": whole.transpose(0, 1), "one element": torch.randn(1, 48, WIDTH).transpose(0, 1),
        "gaps": torch.randn(8, 6, 3 * WIDTH)[..., WIDTH : 2 * WIDTH],
        "expanded": torch.randn(1, 6, WIDTH).expand(8, -1, -1),
        "behind": torch.randn(9, 6, WIDTH)[1:],
    }  # fmt: skip


@pytest.mark.parametrize("kind", list(views()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tensor_comes_back_with_its_shape_and_strides(kind: str, dtype: torch.dtype) -> None:
    x = views()[kind].to(dtype) if kind not in ("gaps", "expanded") else views()[kind]
    one = _saved._Pass(nn.Identity(), SPEC, WIDTH, _saved._calling())
    one._runs = lambda: True  # type: ignore[method-assign]
    kept = one.pack(x)
    back = _saved._unpack(kept)
    assert (back.shape, back.stride(), back.dtype) == (x.shape, x.stride(), x.dtype)
    assert isinstance(kept, _saved._Whole) == (kind == "expanded")
    torch.testing.assert_close(back, x, atol=0.02, rtol=0.01)


# --- bytes ----------------------------------------------------------------------------------------------------------


def test_large_tensors_take_a_byte_and_a_scale_for_128() -> None:
    model = llama(named("w8a8_saved8"))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}
    with listening_to_saved(lambda t: kept.__setitem__(t.untyped_storage()._cdata, t)):
        loss = loss_of(model)
    kept = {key: t for key, t in kept.items() if t.untyped_storage().data_ptr() not in own}
    codes = [t for t in kept.values() if t.dtype == torch.uint8]
    scales = [t for t in kept.values() if t.ndim == 2 and t.shape[1] == 1 and t.dtype == torch.float32]
    assert sum(t.nbytes for t in scales) == sum(t.nbytes for t in codes) / 32
    # Tables, log-sum-exps and statistics of norms are small.
    large = [t for t in kept.values() if t.is_floating_point() and t.numel() > IDS.numel() * WIDTH / 8]
    assert not large
    assert len(codes) > 20
    assert loss.requires_grad


def test_measured_bytes_are_those_of_codes_and_predicted_ones_are_refused() -> None:
    plain, saved = (measure_memory(llama(named(n)), None, loss_of, IDS) for n in ("w8a8", "w8a8_saved8"))
    outside = 4 * IDS.numel() * (64 + WIDTH)  # log-probabilities and the head's input stay
    ratio = (saved.measured.saved_activations - outside) / (plain.measured.saved_activations - outside)
    assert 33 / 128 < ratio < 0.35  # of float32; tables and statistics are whole
    assert saved.stored_in_few_bits.saved_activations == saved.measured.saved_activations
    with pytest.raises(SpecError, match="no rule for saved_activations"):
        predict_memory(llama(named("w8a8_saved8")), 4, 32, device="cpu")


def test_what_is_saved_twice_is_kept_once_and_what_was_changed_between_is_not_mistaken() -> None:
    seen: list[Tensor] = []

    def between(h: Tensor) -> Tensor:
        a = h * 1
        b = a * a  # keeps a, twice
        with torch.no_grad():
            a.mul_(3)
        return b + a * a

    model = converted(Stack(1))
    model.blocks[0].between = between
    x = torch.randn(2, 16, WIDTH)
    with listening_to_saved(seen.append):
        y = model(x)
    codes = {t.data_ptr() for t in seen if t.dtype == torch.uint8}
    assert len(codes) == 4  # x, the layer's output, and a before and after
    y.sum().backward()
    u = x @ model.blocks[0].layer.weight.t()
    h = silu(u)
    expected = torch.autograd.grad((h * h).sum() + (h * 3 * h * 2 / 2).sum(), model.blocks[0].layer.weight)
    assert error(model.blocks[0].layer.weight.grad, expected[0]) < 0.02


def test_memory_that_is_given_out_again_is_not_mistaken() -> None:
    """Every tensor of these is freed at once, so the next one lies where it lay."""
    model, count = Stack(1), 12

    def between(h: Tensor) -> Tensor:
        total = h
        for i in range(count):
            total = total + (h + i) ** 3 / 100
        return total

    model.blocks[0].between = between
    x = torch.randn(2, 16, WIDTH)
    exact = gradients(model, lambda m: m(x).sum())
    assert error(gradients(converted(model), lambda m: m(x).sum()), exact) < 0.02


@pytest.mark.parametrize("backward", [False, True])
def test_what_waited_is_freed_with_its_graph(backward: bool) -> None:
    """At once, not when Python looks for rings."""
    model, codes = converted(Stack()), []

    def listen(t: Tensor) -> None:
        if t.dtype == torch.uint8:
            codes.append(weakref.ref(t))

    gc.collect()
    gc.disable()
    try:
        with listening_to_saved(listen):
            y = model(torch.randn(2, 16, WIDTH) * 1)
        assert codes
        assert all(t() is not None for t in codes)
        if backward:
            y.sum().backward()
            assert all(t() is None for t in codes)  # though y holds the graph
        output = weakref.ref(y)
        del y
        assert output() is None
        assert all(t() is None for t in codes)
    finally:
        gc.enable()


# --- changes in place -----------------------------------------------------------------------------------------------


def test_changes_after_saving_reach_no_gradient_and_those_of_whole_tensors_are_refused() -> None:
    model = converted(Stack(1))

    def between(h: Tensor) -> Tensor:
        a = h * 1
        b = a * a
        with torch.no_grad():
            a.zero_()
        return b

    model.blocks[0].between = between
    model(torch.randn(2, 16, WIDTH)).sum().backward()
    assert model.blocks[0].layer.weight.grad.abs().max() > 0

    def small(h: Tensor) -> Tensor:
        a = h[0, :1, :1] * 1
        b = a * a
        a.zero_()
        return h + b

    model.blocks[0].between = small
    with pytest.raises(RuntimeError, match="modified by an inplace operation.*saved at version 0"):
        model(torch.randn(2, 16, WIDTH)).sum().backward()
    plain = Stack(1)
    plain.blocks[0].between = small
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        plain(torch.randn(2, 16, WIDTH)).sum().backward()


# --- when ------------------------------------------------------------------------------------------------------------


def test_hooks_are_in_force_within_the_forward_pass_alone() -> None:
    model, seen = converted(Stack()), []
    model.blocks[0].between = lambda h: seen.append(hooks_in_force()) or h * h
    model(torch.randn(2, 16, WIDTH))
    with torch.no_grad():
        model(torch.randn(2, 16, WIDTH))
    with high_precision(model):
        model(torch.randn(2, 16, WIDTH))
    set_phase_(model, backward=False)
    model(torch.randn(2, 16, WIDTH))
    set_phase_(model)
    model(torch.randn(2, 16, WIDTH))
    assert seen == [True, False, False, False, True]
    assert not hooks_in_force()


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_quantized(failure: type[BaseException]) -> None:
    model = converted(Stack())

    def fail(_: Tensor) -> Tensor:
        raise failure

    model.blocks[1].between = fail
    with pytest.raises(failure):
        model(torch.randn(2, 16, WIDTH))
    x = torch.randn(2, 16, WIDTH, requires_grad=True)
    (x * x).sum().backward()
    assert torch.equal(x.grad, 2 * x)
    model.blocks[1].between = None
    model(x).sum().backward()
    assert not hooks_in_force()
    assert not _saved._running.passes


def test_the_head_and_what_follows_stay_out() -> None:
    kept: list[Tensor] = []
    model = converted(WithHead())
    x = torch.randn(2, 16, WIDTH)
    with listening_to_saved(kept.append):
        y = model(x)
    large = [t for t in kept if t.is_floating_point() and t.numel() == x.numel()]
    assert len(large) == 2  # the head's input, and exp's output
    assert torch.equal(large[1], y)


def test_two_models_keep_apart() -> None:
    fine, coarse = converted(Stack()), converted(Stack(), Recipe(saved_activations=QuantSpec(INT4, PerBlock(32))))
    coarse.load_state_dict(fine.state_dict())
    x = torch.randn(2, 16, WIDTH)
    plain = Stack()
    plain.load_state_dict(fine.state_dict())
    exact = gradients(plain, lambda m: m(x).sum())
    a, b = fine(x).sum(), coarse(x).sum()
    a.backward()
    b.backward()
    of = [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (fine, coarse)]
    assert 1e-4 < error(of[0], exact) < error(of[1], exact) / 4


def test_copies_and_pickles_keep_it_and_another_recipe_takes_it_away() -> None:
    model = converted(Stack())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    x = torch.randn(2, 16, WIDTH)
    expected = gradients(model, lambda m: m(x).sum())
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(gradients(other, lambda m: m(x).sum()), expected)
    convert_(model, ALONE, verbose=False)
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    convert_(model, Recipe(), verbose=False)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert not model._forward_hooks_always_called


def test_kept_layers_and_models_without_blocks() -> None:
    model = Stack()
    convert_(model, ALONE, keep=Keep(last=1), verbose=False)
    assert len(model._forward_pre_hooks) == 1
    row = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 8))
    assert len(converted(row)._forward_pre_hooks) == 1


def test_weights_stay_as_they_are() -> None:
    """A kept layer's too, which autocast casts, and frozen ones."""
    model = Stack()
    convert_(model, ALONE, keep=Keep(last=1), verbose=False)
    model.blocks[0].layer.weight.requires_grad_(False)
    kept: list[Tensor] = []
    x = torch.randn(2, 16, WIDTH, requires_grad=True)
    with listening_to_saved(kept.append), torch.autocast("cpu", torch.bfloat16):
        model(x * 1)
    assert sum(t.shape == (WIDTH, WIDTH) for t in kept) == 2
    assert not any(t.dtype == torch.uint8 and t.numel() == WIDTH * WIDTH for t in kept)


# --- compilers and checkpoints --------------------------------------------------------------------------------------


def test_weights_with_noise_stay_as_they_are() -> None:
    model = llama(ALONE)
    GaussWS().prepare_(model, 0)
    GaussWS().before_forward_(model, Position(0, 1, 0))
    kept: list[Tensor] = []
    with listening_to_saved(kept.append):
        loss_of(model)
    shapes = {layer.weight.shape for layer in model.modules() if isinstance(layer, QuantizedLinear)}
    whole = [t for t in kept if t.is_floating_point() and {t.shape, t.shape[::-1]} & shapes]
    assert len(whole) >= 14  # of two blocks of seven layers


@pytest.mark.filterwarnings("ignore")  # of torch, from inside dynamo
@pytest.mark.parametrize(
    ("whole", "backend"),
    [(False, "aot_eager"), (True, "aot_eager"), pytest.param(False, "inductor", marks=pytest.mark.slow)],
)
def test_compiled_models_keep_codes(whole: bool, backend: str, compile_backend: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, plain = llama(named("w8a8_saved8")), llama(named("w8a8"))
    exact = gradients(plain)
    for part in [model] if whole else model.model.layers:
        part.compile(backend=compile_backend if backend == "inductor" else backend, dynamic=False)
    kept: list[Tensor] = []
    with listening_to_saved(kept.append):
        found = gradients(model)
    assert 1e-5 < error(found, exact) < 0.03
    assert sum(t.dtype == torch.uint8 for t in kept) >= 12
    if not whole:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert not torch._dynamo.utils.counters["graph_break"]
        before = sum(torch._dynamo.utils.counters["frames"].values())
        gradients(model)
        assert sum(torch._dynamo.utils.counters["frames"].values()) == before


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_keep_codes_of_their_inputs(reentrant: bool) -> None:
    model, plain = llama(named("w8a8_saved8")), llama(named("w8a8"))
    exact = gradients(plain)
    model.model.embed_tokens.weight.requires_grad_(True)
    # transformers 5.23 renamed it.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    kept: list[Tensor] = []
    with listening_to_saved(kept.append):
        found = gradients(model)
    assert 1e-5 < error(found, exact) < 0.02
    inputs = [t for t in kept if t.dtype == torch.uint8 and t.numel() == IDS.numel() * WIDTH]
    assert 2 <= len(inputs) <= 8  # of two blocks, and what the last norm keeps


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(INT8, PerRow()),
        QuantSpec(E4M3, PerBlock(128)),
        QuantSpec(UINT8, PerBlock(128)),
        QuantSpec(INT8, PerBlock(128), Asymmetric()),
        QuantSpec(INT8, PerBlock(128), rounding=Rounding.STOCHASTIC),
    ],
)
def test_other_specs_are_refused(spec: QuantSpec) -> None:
    with pytest.raises(SpecError, match=r"saved_activations=.*PerBlock\(128\)"):
        Recipe(saved_activations=spec)


def test_two_ways_in_one_model_are_refused() -> None:
    other = Recipe(saved_activations=QuantSpec(INT4, PerBlock(128)))
    with pytest.raises(ConversionError, match="int8 block 128` for blocks.0.layer and `int4 block 128` for blocks.1"):
        convert_(Stack(), lambda name, _: ALONE if "0" in name else other, verbose=False)
    model = Stack()
    convert_(model, lambda name, _: ALONE if "0" in name else None, verbose=False)
    with pytest.raises(ConversionError, match="for blocks.0.layer and .* for blocks.1.layer"):  # one at a time
        convert_(model, lambda name, _: other if "1" in name else None, verbose=False)
    convert_(model, other, verbose=False)


def test_the_recipe_says_it_and_older_records_are_as_they_were() -> None:
    assert str(named("w8a8_saved8")).endswith("what else waits for backward int8 block 128; simulated")
    assert named("w8a8_saved8").to_dict()["saved_activations"] == "int8 block 128"
    assert "saved_activations" not in named("w8a8").to_dict()
