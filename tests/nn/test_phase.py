# SPDX-License-Identifier: Apache-2.0
"""Forward and backward quantizers switched apart (spec of NVFP4 pre-training, 2.7 and C12)."""

from __future__ import annotations

import copy
import itertools
import shutil

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowbits.errors import RunError
from lowbits.nn import (
    Phase,
    Recipe,
    Save,
    check_phases,
    convert_,
    high_precision,
    phase_at,
    quantized_layers,
    set_phase_,
    set_step_,
)
from lowbits.recipes import NAMED, named

# Native FP8 needs FP8 units.
ANYWHERE = sorted(n for n in NAMED if not (n.startswith("fp8") and n.endswith("native")))
BOTH = [False, True]


def plain(bias: bool = True) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(32, 48, bias=bias), nn.GELU(), nn.Linear(48, 16, bias=bias))


def converted(recipe: Recipe, bias: bool = True) -> nn.Module:
    model = plain(bias)
    convert_(model, recipe, verbose=False)
    return model


def run(model: nn.Module, x: Tensor, bf16: bool = True) -> list[Tensor]:
    """Output, gradient of the input, gradients of the parameters."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = model(x)
    torch.manual_seed(2)
    y.backward(torch.randn_like(y))
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(ours: list[Tensor], theirs: list[Tensor]) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize("bias", BOTH)
@pytest.mark.parametrize("bf16", BOTH)
@pytest.mark.parametrize("name", ["w8a8g8", "int8_rowwise", "int8_rowwise_native", "fp8_rowwise", "nvfp4"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "matrix"])
def test_c12_without_the_forward_the_output_is_that_of_linear(name, bf16, bias, layout):
    x = torch.randn(3, 32, 32)
    x = {"contiguous": x, "transposed": x.transpose(0, 1), "matrix": x[0]}[layout]
    reference, model = plain(bias), converted(named(name), bias)
    assert list(model.state_dict()) == list(reference.state_dict())
    set_phase_(model, forward=False)
    ours, theirs = run(model, x, bf16), run(reference, x, bf16)
    assert torch.equal(ours[0], theirs[0])
    equal = dict(zip(["dx", *(n for n, _ in model.named_parameters())], same(ours[1:], theirs[1:]), strict=True))
    # Weights see quantized gradients. The last bias sums the loss's own gradient, which nothing has quantized.
    assert not equal["0.weight"] and not equal["2.weight"]
    assert not bias or equal["2.bias"]
    set_phase_(model, forward=False, backward=False)
    assert all(same(run(model, x, bf16), theirs))


@pytest.mark.parametrize("name", ["w8a8_faithful", "w8a8g8", "int8_rowwise_native", "nvfp4"])
def test_without_the_backward_the_gradients_are_those_of_linear_at_the_same_output(name):
    """One layer: its gradients depend on X, W and G alone, so those of `nn.Linear` are the reference."""
    reference, model = plain()[:1], converted(named(name))[:1]
    x = torch.randn(4, 32, 32)
    set_phase_(model, backward=False)
    ours, theirs = run(model, x, bf16=False), run(reference, x, bf16=False)
    assert not torch.equal(ours[0], theirs[0])
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(a, b)  # the same products, summed as one matrix product or another


@pytest.mark.parametrize("name", ANYWHERE)
def test_every_recipe_comes_back_bit_for_bit(name):
    """All four combinations, in any order; what a step computes depends on the combination alone."""
    x, model = torch.randn(4, 32, 32), converted(named(name))
    recipes = {n: layer.recipe for n, layer in quantized_layers(model).items()}
    before = {passes: None for passes in itertools.product(BOTH, BOTH)}
    for passes in [*before, *reversed(before)]:
        set_phase_(model, forward=passes[0], backward=passes[1])
        set_step_(model, 7)
        found = run(model, x)
        if before[passes] is not None:
            assert all(same(found, before[passes]))
        before[passes] = found
        assert {n: layer.recipe for n, layer in quantized_layers(model).items()} == recipes
    set_phase_(model)
    set_step_(model, 7)
    fresh = converted(named(name))
    set_step_(fresh, 7)
    assert all(same(run(model, x), run(fresh, x)))


@pytest.mark.parametrize("forward, backward", list(itertools.product(BOTH, BOTH)))
def test_high_precision_and_an_assigned_recipe_in_a_phase(forward, backward):
    """`high_precision` is off in any phase, a switch within it lasts, and a recipe assigned in a phase is in it."""
    x, model, reference = torch.randn(2, 16, 32), converted(named("w8a8g8")), plain()
    set_phase_(model, forward=not forward, backward=backward)
    with high_precision(model):
        assert all(same(run(model, x), run(reference, x)))
        set_phase_(model, forward=forward, backward=backward)
        assert all(same(run(model, x), run(reference, x)))
    fresh = converted(named("w8a8g8"))
    set_phase_(fresh, forward=forward, backward=backward)
    assert all(same(run(model, x), run(fresh, x)))
    for layer in quantized_layers(model).values():
        layer.recipe = named("nvfp4")
    fresh = converted(named("nvfp4"))
    set_phase_(fresh, forward=forward, backward=backward)
    assert all(same(run(model, x), run(fresh, x)))


def test_conv1d_and_a_copy_are_in_the_phase_too():
    model = nn.Sequential(Conv1D(12, 16))
    convert_(model, named("w8a8"), verbose=False)
    x = torch.randn(2, 5, 16)
    with high_precision(model):
        off = model(x)
    set_phase_(model, forward=False)
    assert torch.equal(model(x), off) and torch.equal(copy.deepcopy(model)(x), off)
    set_phase_(model)
    assert not torch.equal(model(x), off)


def test_what_waits_for_backward_follows():
    model = converted(named("w8a8_faithful"))
    layer = quantized_layers(model)["0"]
    for forward, backward in itertools.product(BOTH, BOTH):
        set_phase_(model, forward=forward, backward=backward)
        assert layer.active.save is (Save.QUANTIZED if forward and backward else Save.ORIGINAL)
        assert layer.active.plain == (not forward)  # w8a8 leaves the gradients alone


def test_phase_at_is_a_pure_function_of_the_step():
    warm_up = (Phase(0, forward=False, backward=False), Phase(3), Phase(0.82, forward=False))
    found = [phase_at(warm_up, step, 10) for step in range(10)]
    assert [(p.forward, p.backward) for p in found] == [(False, False)] * 3 + [(True, True)] * 6 + [(False, True)]
    assert phase_at((), 5, 10) == Phase(0)
    # 0.07 * 100 is more than 7 in binary.
    assert [Phase(share).first_step(100) for share in (0.07, 0.82, 0.825)] == [7, 82, 83]


@pytest.mark.parametrize(
    ("text", "phase"),
    [
        ("82%:forward=off", Phase(0.82, forward=False)),
        ("12.5%:backward=off", Phase(0.125, backward=False)),
        ("0:off", Phase(0, forward=False, backward=False)),
        ("200:on", Phase(200)),
        ("29%:off", Phase(0.29, forward=False, backward=False)),
    ],
)
def test_phases_are_read_and_written(text, phase):
    assert Phase.parse(text) == phase and str(phase) == text
    assert Phase.parse("0.82:backward=on,forward=off") == Phase(0.82, forward=False)


@pytest.mark.parametrize(
    "text", ["forward=off", "82%", "x:off", "5:of", "5:forward=off,forward=on", "5:fprop=off", "-1:off", "1:"]
)
def test_what_is_no_phase_is_told_the_syntax(text):
    with pytest.raises(RunError, match=r"is no phase.*START:SWITCHES.*for example 82%:forward=off\."):
        Phase.parse(text)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ("100%:off", r"at a share of the run below 1 \(0\.82, or 82%\), got 1\.0"),
        ("10:off", r"phase 10:off begins at step 10, the run ends with step 9"),
        ("3:off 30%:on", r"phases 3:off and 30%:on overlap: both begin at step 3"),
        ("5:off 2:on", r"phase 2:on \(step 2\) comes after 5:off \(step 5\)\. Order them"),
        ("0:on", r"phase 0:on changes nothing: forward quantized, backward quantized"),
        ("2:forward=off 5:forward=off", r"phase 5:forward=off changes nothing: forward in high precision"),
    ],
)
def test_phases_that_do_not_follow_each_other(phases, message):
    with pytest.raises(RunError, match=message):
        check_phases([Phase.parse(text) for text in phases.split()], steps=10)


@pytest.mark.filterwarnings("ignore")  # of torch, from inside dynamo
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")
def test_compiled_blocks_are_compiled_once_a_phase():
    """Four blocks share one graph a phase, and a phase that comes again has its graph already."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    compilations = CompileCounter()
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)) for _ in range(4))
    convert_(blocks, named("w8a8g8"), verbose=False)
    eager = copy.deepcopy(blocks)
    for block in blocks:
        block.compile(backend=compilations)
    x, counts = torch.randn(8, 16), []
    for forward, backward in [(True, True), (False, True), (True, False), (False, False), (True, True), (False, True)]:
        for network in (blocks, eager):
            set_phase_(network, forward=forward, backward=backward)
        for _ in range(2):
            found = [run(block, x, bf16=False) for block in blocks]
        counts.append(compilations.frame_count)
        for block, (output, *_) in zip(eager, found, strict=True):
            assert torch.equal(output, run(block, x, bf16=False)[0])
    assert counts == [1, 2, 3, 4, 4, 4]
