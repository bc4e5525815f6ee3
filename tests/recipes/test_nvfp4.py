# SPDX-License-Identifier: Apache-2.0
"""The NVFP4 and microscaling recipes inside a linear layer: what is multiplied, drawn, saved."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lowbits.nn import Recipe, Save, convert_, set_step_
from lowbits.quantizers import Noise, QuantSpec, Rounding, quantize
from lowbits.recipes import named

BLOCKS = ("nvfp4", "nvfp4_pow2", "nvfp4_sr_forward", "nvfp4_w1d", "mxfp4", "mxfp6_e2m3", "mxfp8", "fp8_block")


def layer(recipe: Recipe, size: tuple[int, int] = (48, 80)) -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*size))
    convert_(model, recipe, seed=5, verbose=False)
    set_step_(model, 7)
    return model[0]


def run(linear: nn.Linear, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    linear.weight.grad = None
    x = x.clone().requires_grad_()
    y = linear(x)
    y.backward(g)
    return y.detach(), x.grad, linear.weight.grad


def decoded(x: Tensor, spec: QuantSpec, role: str, step: int = 7) -> Tensor:
    """What an operand stands for, float64; both operands of wgrad in the same rotated basis."""
    return quantize(x, spec, spec.draw(Noise.of(5, "0", role), x.shape, step)).rotated().double()


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("tokens", [64, 37])
def test_three_gemms_of_decoded_operands(name: str, tokens: int) -> None:
    """Check C10; 37 tokens fill no group, tile or rotation."""
    linear, recipe = layer(named(name)), named(name)
    x, g = torch.randn(tokens, 48), torch.randn(tokens, 80) * 1e-3
    y, dx, dw = run(linear, x, g)
    w = linear.weight.detach()
    expected = (
        decoded(x, recipe.fprop.lhs, "fprop.lhs") @ decoded(w, recipe.fprop.rhs, "fprop.rhs").t() + linear.bias,
        decoded(g, recipe.dgrad.lhs, "dgrad.lhs") @ decoded(w.t(), recipe.dgrad.rhs, "dgrad.rhs").t(),
        decoded(g.t(), recipe.wgrad.lhs, "wgrad.lhs") @ decoded(x.t(), recipe.wgrad.rhs, "wgrad.rhs").t(),
    )
    for ours, theirs in zip((y, dx, dw), expected, strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.parametrize("name", BLOCKS)
def test_saving_codes_changes_no_bit(name: str) -> None:
    x, g = torch.randn(50, 48), torch.randn(50, 80)
    for ours, theirs in zip(
        run(layer(named(name)), x, g), run(layer(replace(named(name), save=Save.ORIGINAL)), x, g), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("name", "most"), [("nvfp4", 0.60), ("mxfp4", 0.60), ("mxfp8", 1.05), ("fp8_block", 1.05)])
def test_what_waits_for_backward_is_codes(name: str, most: float) -> None:
    """Check G6: bytes an element of X, by the storages that autograd keeps."""
    linear, x = layer(named(name), (512, 256)), torch.randn(1024, 512, requires_grad=True)
    kept: dict[int, int] = {}
    known = {linear.weight.untyped_storage().data_ptr(), linear.noise.untyped_storage().data_ptr()}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = linear(x)
    held = sum(nbytes for place, nbytes in kept.items() if place not in known)
    assert y.requires_grad and held <= most * x.numel()


def test_random_bits_follow_step_and_role() -> None:
    """Check C8: the same seed and step give the same bits, another step or role others."""
    linear = layer(named("nvfp4"))
    x, g = torch.randn(64, 48), torch.randn(64, 80)
    first, again = run(linear, x, g), run(linear, x, g)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    linear.noise[0] = 8
    y, dx, dw = run(linear, x, g)
    assert torch.equal(y, first[0]) and not torch.equal(dx, first[1]) and not torch.equal(dw, first[2])
    spec = named("nvfp4").dgrad.lhs
    assert spec is not None and spec.rounding is Rounding.STOCHASTIC_8BIT
    rows, columns = (
        spec.draw(Noise.of(5, "0", role), (1 << 14,), 7) for role in ("dgrad.lhs", "wgrad.lhs")
    )  # fmt: skip
    assert torch.corrcoef(torch.stack([rows, columns]))[0, 1].abs() < 4 / 2**7  # four standard errors


def test_weights_are_the_same_numbers_in_both_directions() -> None:
    """Check C6: 16x16 tiles turn with the matrix, 1x16 blocks do not."""
    w = torch.randn(80, 48)
    tile, row = named("nvfp4").fprop.rhs, named("nvfp4_w1d").fprop.rhs
    assert torch.equal(quantize(w.t(), tile).dequantize(), quantize(w, tile).dequantize().t())
    differ = quantize(w.t(), row).dequantize() != quantize(w, row).dequantize().t()
    assert differ.float().mean() > 0.5


def test_nan_reaches_the_output() -> None:
    linear, x = layer(named("nvfp4")), torch.randn(32, 48)
    x[3, 4] = torch.nan
    assert linear(x).isnan().all()  # the tensor's own scale is NaN


@pytest.mark.filterwarnings("ignore")  # of torch, from inside dynamo
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "fp8_rowwise"])
def test_a_compiled_layer_computes_the_same(name: str) -> None:
    x, g = torch.randn(40, 48), torch.randn(40, 80)
    eager, linear = run(layer(named(name)), x, g), layer(named(name))
    torch._dynamo.reset()
    linear.compile(fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(run(linear, x, g), eager, strict=True):
        assert torch.equal(ours, theirs)
