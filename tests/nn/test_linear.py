# SPDX-License-Identifier: Apache-2.0
"""The three GEMMs against closed forms (U4, U5, U6), and what waits for backward (H3)."""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lowbits.errors import ShapeError
from lowbits.formats import INT4, INT8
from lowbits.kernels import _each
from lowbits.models import build
from lowbits.nn import (
    Execution,
    Gemm,
    Recipe,
    Save,
    _gemms,
    _recipe,
    convert_,
    high_precision,
    quantized_layers,
    set_phase_,
    set_step_,
    weights_quantized_once,
)
from lowbits.quantizers import AbsMean, Amax, PerColumn, PerGroup, PerRow, PerTensor, QuantSpec, Rounding
from lowbits.recipes import NAMED, named
from tests.oracles.linear_quantizer import fake_quantize

A, W = QuantSpec(INT8, PerRow()), QuantSpec(INT4, PerRow())
G_WGRAD, G_DGRAD = QuantSpec(INT8, PerColumn()), QuantSpec(INT8, PerRow())


def make(recipe: Recipe, conv1d: bool = False, bias: bool = True) -> nn.Module:
    torch.manual_seed(1)
    layer = Conv1D(12, 20) if conv1d else nn.Linear(20, 12, bias=bias)
    model = nn.Sequential(layer)
    nn.init.normal_(model[0].weight)
    convert_(model, recipe, verbose=False)
    return model


def run(model: nn.Module, x: torch.Tensor, g: torch.Tensor):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(g)
    weight, bias = model[0].weight, model[0].bias
    return y.detach(), x.grad, weight.grad, None if bias is None else bias.grad


SWITCHES = [False, True]
# qa, qw, qg, which GEMM sees the quantized G, operand-faithful; the last keeps both operands' codes, so it needs both.
CASES = [
    c for c in itertools.product(SWITCHES, SWITCHES, SWITCHES, ["wgrad", "dgrad"], SWITCHES) if not c[4] or all(c[:2])
]


@pytest.mark.parametrize(("qa", "qw", "qg", "mode", "faithful"), CASES)
@pytest.mark.parametrize("conv1d", [False, True])
def test_u4_placement_equals_closed_forms(qa, qw, qg, mode, faithful, conv1d):
    gradient = Gemm({"wgrad": G_WGRAD, "dgrad": G_DGRAD}[mode] if qg else None, None)
    save = Save.QUANTIZED if faithful else Save.ORIGINAL
    recipe = Recipe(fprop=Gemm(A if qa else None, W if qw else None), save=save, **{mode: gradient})
    model = make(recipe, conv1d)
    x, g = torch.randn(7, 20), torch.randn(7, 12)
    w = model[0].weight.detach().t() if conv1d else model[0].weight.detach()
    # Spec 2.4 in float64: token scales on X and G, channel scales on W.
    x64, w64, g64 = (t.double().numpy() for t in (x, w, g))
    x_hat = fake_quantize(x64, "row", 8) if qa else x64
    w_hat = fake_quantize(w64, "row", 4) if qw else w64
    g_hat = fake_quantize(g64, "row", 8) if qg else g64
    x_back, w_back = (x_hat, w_hat) if faithful else (x64, w64)
    y = x_hat @ w_hat.T + model[0].bias.detach().double().numpy()
    dx = (g_hat if mode == "dgrad" else g64) @ w_back
    dw = (g_hat if mode == "wgrad" else g64).T @ x_back
    got = run(model, x, g)
    for ours, expected in zip(got, (y, dx, dw.T if conv1d else dw, g64.sum(0)), strict=True):
        # Scales are rounded to float32 (2^-24 each) and 20 products of up to 10 are summed: 22 * 2^-24 * 20 * 0.7.
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("conv1d", [False, True])
def test_u5_quantizers_off_is_the_plain_layer_bit_for_bit(dtype, conv1d):
    torch.manual_seed(1)
    plain = nn.Sequential((Conv1D(12, 20) if conv1d else nn.Linear(20, 12)).to(dtype))
    ours = copy.deepcopy(plain)
    convert_(ours, named("w8a8g8"), verbose=False)
    x, g = torch.randn(3, 5, 20, dtype=dtype), torch.randn(3, 5, 12, dtype=dtype)
    with high_precision(ours):
        off = run(ours, x, g)
    exact = conv1d is False
    for a, b in zip(off, run(plain, x, g), strict=True):
        # Conv1D itself calls addmm on [in, out]; the product through linear() may sum in another order.
        assert (
            torch.equal(a, b)
            if exact
            else torch.allclose(
                a, b, rtol=2e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-2 if dtype is torch.bfloat16 else 1e-5
            )
        )
    assert not torch.equal(run(ours, x, g)[0], off[0])


def test_fused_qkv_gets_three_sets_of_gradient_scales():
    recipe = Recipe(wgrad=Gemm(QuantSpec(INT8), None), grad_parts=3)
    model = make(recipe)
    x, g = torch.randn(7, 20), torch.randn(7, 12) * torch.tensor([1.0] * 4 + [1e-3] * 4 + [30.0] * 4)
    _, _, dw, _ = run(model, x, g)
    parts = [fake_quantize(p.double().numpy(), "tensor", 8) for p in g.chunk(3, 1)]
    np.testing.assert_allclose(dw.numpy(), np.concatenate(parts, 1).T @ x.double().numpy(), rtol=1e-5, atol=1e-5)
    merged = fake_quantize(g.double().numpy(), "tensor", 8).T @ x.double().numpy()
    assert np.abs(merged[4:8]).max() == 0  # one scale for all would have erased the small part


# Native FP8 needs FP8 units: tests/kernels has its GPU tests.
@pytest.mark.parametrize("name", sorted(n for n in NAMED if not (n.startswith("fp8") and n.endswith("native"))))
def test_every_recipe_runs_forward_and_backward(name):
    recipe = NAMED[name]
    model = make(recipe)
    y, dx, dw, db = run(model, torch.randn(2, 8, 20), torch.randn(2, 8, 12))
    for t in (y, dx, dw, db):
        assert t.isfinite().all()
    reference = make(Recipe())
    torch.manual_seed(0)
    x, g = torch.randn(2, 8, 20), torch.randn(2, 8, 12)
    # Three levels of the mean magnitude leave 0.40 of a uniform weight's norm, 0.45 of a normal one's.
    most = 0.5 if name == "bitnet_b158" else 0.4
    for ours, plain in zip(run(model, x, g), run(reference, x, g), strict=True):
        assert (ours - plain).norm() <= most * plain.norm()


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("conv1d", [True, False])
def test_native_int8_equals_its_simulation(conv1d, forward):
    recipe = named("int8_rowwise")
    models = [make(replace(recipe, execution=kind), conv1d) for kind in (Execution.SIMULATED, Execution.AUTO)]
    assert ["native" in str(model) for model in models] == [False, True]
    for model in models:
        set_phase_(model, forward=forward)
    x, g = torch.randn(40, 20), torch.randn(40, 12)
    # Codes are the same; 40 products are summed in float32, or exactly: 40 * 2^-24 * 40 * 1.
    for a, b in zip(run(models[0], x, g), run(models[1], x, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, while it traces autograd functions
def test_layers_of_several_recipes_and_sizes_are_whole_graphs():
    """A number that differs between layers is one that changes, for a compiler; what is asked of it must not break."""
    torch._dynamo.reset()
    floors = (Amax(), Amax(1e-5), Amax(1e-8))
    for row in (QuantSpec(INT8, PerRow(), floor) for floor in floors):
        layer = make(Recipe(fprop=Gemm(row, row), dgrad=Gemm(row, row), wgrad=Gemm(row, row), execution=Execution.AUTO))
        layer.compile(backend="aot_eager", fullgraph=True, dynamic=True)
        for tokens in (7, 8, 30):
            assert run(layer, torch.randn(tokens, 20), torch.randn(tokens, 12))[1].any()


def cpu_has_row_scales() -> bool:
    """torch 2.11 has none."""
    one, scale = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(one, one.t(), scale, scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, while it traces autograd functions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["int8_rowwise", "fp8_tensorwise", "fp8_block", "nvfp4", "w8a8", "w8a8_faithful"])
def test_compiled_gradients_are_those_of_eager_layers(name, dtype, monkeypatch):
    """Where the result of an autograd function was what `.to` gave back unchanged, torch 2.11 lost them."""
    if name == "fp8_tensorwise":
        monkeypatch.setattr(_recipe, "missing_unit", lambda *_: None)
    torch._dynamo.reset()
    layer = make(named(name))[0].to(dtype)
    x, g = torch.randn(32, 20).to(dtype).requires_grad_(), torch.randn(32, 12).to(dtype)
    results = []
    for runs in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)):
        x.grad = layer.weight.grad = layer.bias.grad = None
        y = runs(x)
        y.backward(g)
        results.append((y.detach(), x.grad, layer.weight.grad, layer.bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)) and results[1][1].any()


@pytest.mark.parametrize(
    "name", ["fp8_rowwise", "fp8_rowwise_fast", "fp8_tensorwise", "fp8_rowwise_hp_wgrad", "fp8_rowwise_pow2"]
)
def test_native_fp8_equals_its_simulation(name, monkeypatch):
    """torch's FP8 GEMM has an implementation on CPUs, without units; asked for here as if it had some."""
    if name != "fp8_tensorwise" and not cpu_has_row_scales():
        pytest.skip("this torch multiplies FP8 under scales of rows on GPUs alone")
    monkeypatch.setattr(_recipe, "missing_unit", lambda *_: None)
    kinds = (Execution.SIMULATED, Execution.AUTO)
    models = [make(replace(named(name), execution=kind), bias=False) for kind in kinds]
    x, g = torch.randn(40, 20), torch.randn(40, 12)
    results = []
    for model in models:
        with torch.autocast("cpu", torch.bfloat16):
            results.append(run(model, x, g.bfloat16())[:3])
    assert "native" in str(models[1])
    for a, b in zip(*results, strict=True):
        # The stand-in rounds decoded operands to bfloat16 and both round the result: 2^-9 four times.
        assert (a.float() - b.float()).norm() <= 2**-7 * a.float().norm()


def test_native_layers_show_an_observer_what_they_multiply():
    model = make(named("int8_rowwise"))
    seen = {}
    model[0].observer = lambda role, x, q: seen.update({role: (x, q)})
    run(model, torch.randn(6, 20), torch.randn(6, 12))
    assert list(seen) == ["fprop.lhs", "wgrad.rhs", "fprop.rhs", "dgrad.rhs", "dgrad.lhs", "wgrad.lhs"]
    for x, q in seen.values():
        expected = fake_quantize(x.detach().double().numpy(), "row", 8)
        np.testing.assert_allclose(q.dequantize(), expected, rtol=3 * 2**-24)  # the scale is float32 here


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd keeps for backward, each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    del y
    return sum(kept.values())


def test_h3_operand_faithful_saves_codes():
    """Exact by count: int8 codes and a float32 scale a row of X and W; the noise buffer is 8 * 13 bytes."""
    x = torch.randn(256, 20, dtype=torch.bfloat16, requires_grad=True) * 1
    ref, faithful = (make(replace(named(n), grad_parts=1), bias=False).bfloat16() for n in ("w8a8", "w8a8_faithful"))
    assert saved_bytes(ref, x) == 256 * 20 * 2 + 8 * 13
    assert saved_bytes(faithful, x) == (256 * 20 + 4 * 256) + (12 * 20 + 4 * 12) + 8 * 13


def test_native_layers_save_the_codes_that_backward_multiplies():
    """X.T [20, 256] and W.T [20, 12], filled up to 16 bytes; a float32 scale a row."""
    x = torch.randn(256, 20, dtype=torch.bfloat16, requires_grad=True) * 1
    native = make(named("int8_rowwise"), bias=False).bfloat16()
    assert saved_bytes(native, x) == (20 * 256 + 4 * 20) + (20 * 16 + 4 * 20) + 8 * 13
    only_x = make(replace(named("int8_rowwise"), dgrad=Gemm()), bias=False).bfloat16()
    assert saved_bytes(only_x, x) == (20 * 256 + 4 * 20) + 8 * 13


def test_autocast_quantizes_the_float32_weight_and_multiplies_in_bf16():
    model = make(named("w8a8"))
    x = torch.randn(5, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert model[0].weight.grad.dtype is torch.float32
    w_hat = torch.from_numpy(fake_quantize(model[0].weight.detach().double().numpy(), "row", 8)).bfloat16()
    x_hat = torch.from_numpy(fake_quantize(x.bfloat16().double().numpy(), "row", 8)).bfloat16()
    torch.testing.assert_close(y, x_hat @ w_hat.t() + model[0].bias.bfloat16(), rtol=2**-7, atol=2**-7)


_DRAWN = QuantSpec(INT8, PerRow(), rounding=Rounding.STOCHASTIC)
STOCHASTIC = replace(named("int8_rowwise"), dgrad=Gemm(_DRAWN, _DRAWN), wgrad=Gemm(_DRAWN, _DRAWN))


def test_random_bits_are_a_function_of_the_step():
    x, g = torch.randn(9, 20), torch.randn(9, 12)

    def at(step: int):
        model = make(STOCHASTIC)
        set_step_(model, step)
        return run(model, x, g)[2]

    assert torch.equal(at(3), at(3))
    assert not torch.equal(at(3), at(4))
    torch.testing.assert_close(
        torch.stack([at(s) for s in range(200)]).mean(0), run(make(Recipe()), x, g)[2], rtol=0, atol=0.1
    )


def test_gradient_checkpointing_gives_the_same_bits():
    x, g = torch.randn(9, 20), torch.randn(9, 12)
    for recipe in (STOCHASTIC, named("w8a8g8_faithful")):
        plain, ckpt = make(recipe), make(recipe)
        set_step_(plain, 5), set_step_(ckpt, 5)
        expected = run(plain, x, g)
        inner = x.clone().requires_grad_()
        y = checkpoint(ckpt, inner, use_reentrant=False)
        y.backward(g)
        assert torch.equal(y, expected[0]) and torch.equal(inner.grad, expected[1])
        assert torch.equal(ckpt[0].weight.grad, expected[2])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, from inside inductor
@pytest.mark.parametrize(
    "recipes",
    [
        ("w8a8g8_faithful", "fp8_rowwise"),
        pytest.param((STOCHASTIC,), marks=pytest.mark.slow, id="stochastic"),
    ],
    ids=str,
)
def test_compiles_to_one_graph_with_the_same_numbers(recipes, compile_backend):
    """Differently quantized layers under one compiled forward: constants of formats must not become inputs."""
    torch._dynamo.reset()
    for recipe in (named(r) if isinstance(r, str) else r for r in recipes):
        model = make(recipe)
        set_step_(model, 2)
        x, g = torch.randn(9, 20), torch.randn(9, 12)
        eager = run(model, x, g)
        model.zero_grad()
        compiled = torch.compile(model, fullgraph=True, backend=compile_backend)
        inner = x.clone().requires_grad_()
        y = compiled(inner)
        y.backward(g)
        for a, b in zip((y.detach(), inner.grad, model[0].weight.grad), eager, strict=False):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_non_finite_input_is_propagated():
    model = make(named("w8a8"))
    x = torch.randn(4, 20)
    x[2, 3] = float("nan")
    y = model(x)
    assert y[2].isnan().all() and y[[0, 1, 3]].isfinite().all()


def test_a_shape_error_in_training_names_the_layer():
    model = make(Recipe(wgrad=Gemm(QuantSpec(INT8, PerGroup(8), AbsMean()), None)))
    (layer,) = quantized_layers(model).values()
    assert layer.layer_name == "0"
    x = torch.randn(7, 20, requires_grad=True)
    with pytest.raises(ShapeError, match="0, wgrad.lhs: .*would count"):
        model(x).sum().backward()


def test_extra_repr_shows_the_recipe():
    assert "fprop int8 row x int8 row; simulated" in repr(make(named("w8a8")))
    assert "per" not in repr(make(Recipe(fprop=Gemm(QuantSpec(INT8, PerTensor()), None)))).lower().split("recipe")[1]


@pytest.mark.filterwarnings("ignore")  # of torch, from inside dynamo
def test_the_blocks_of_a_model_share_one_graph_without_a_break():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build("gpt2-pico", vocab_size=64, block=8, seed=0)
    convert_(model, named("w8a8g8"), verbose=False)
    for block in model.transformer.h:
        block.compile(fullgraph=True, backend="aot_eager")
    model(input_ids=torch.zeros(1, 8, dtype=torch.int64), use_cache=False).logits.sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("conv1d", [True, False])
def test_weights_quantized_once_change_no_bit(conv1d, monkeypatch):
    """Each layer's weight is quantized once for two passes instead of twice."""
    calls = []
    model = nn.Sequential(*make(named("int8_rowwise"), conv1d), nn.Tanh(), nn.Linear(12, 3))
    x, g = torch.randn(7, 20), torch.randn(7, 3)
    for module in (_gemms, _each):
        inner = module.quantize_both
        monkeypatch.setattr(module, "quantize_both", lambda *args, f=inner: calls.append(args[0].shape) or f(*args))
    results = []
    for once in (False, True):
        calls.clear()
        model.zero_grad()
        with weights_quantized_once(model) if once else nullcontext():
            passes = [run(model, x * scale, g)[:2] for scale in (1.0, 0.5)]
        results.append([*passes[0], *passes[1], model[0].weight.grad.clone(), len(calls)])
    assert all(torch.equal(a, b) for a, b in zip(results[0][:-1], results[1][:-1], strict=True))
    assert (results[0][-1], results[1][-1]) == (2 * 3, 1 + 2 * 2) and model[0].copies is None
