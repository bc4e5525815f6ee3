# SPDX-License-Identifier: Apache-2.0
"""The parameterised quantizer against a float64 oracle, finite differences and its own definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lowbits.errors import ConversionError, SpecError
from lowbits.methods import geta
from tests.oracles import geta as oracle

RANGES = st.floats(0.05, 4.0)
EXPONENTS = st.floats(0.5, 2.0)


def scalars(*values: float) -> list[Tensor]:
    return [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values]


def drawn(seed: int, size: int = 64) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(size, generator=noise, dtype=torch.float64) for _ in range(2))
    x[0] = 0.0
    return x, g


@given(st.integers(0, 1000), st.floats(2.0, 9.0), RANGES, EXPONENTS)
def test_values_and_all_four_gradients_are_the_oracles(seed: int, bits: float, q: float, t: float) -> None:
    x, g = drawn(seed)
    x[1], x[2] = q, -q  # at the edge of the range
    d = oracle.step(bits, q, t)
    parameters = scalars(d, q, t)
    x.requires_grad_()
    y = geta.quantize(x, *parameters)
    y.backward(g)
    want = [oracle.quantized(v, d, q, t) for v in x.tolist()]
    torch.testing.assert_close(y.detach(), torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    each, found = oracle.gradients(x.tolist(), g.tolist(), d, q, t)
    assert x.grad is not None and x.grad.tolist() == each  # A2: 1 inside, 0 outside, exact
    for parameter, value in zip(parameters, found, strict=True):
        assert parameter.grad is not None and float(parameter.grad) == pytest.approx(value, rel=1e-9, abs=1e-9)


def test_scalar_gradients_are_those_of_the_frozen_residual() -> None:
    """A1: autograd of sgn(x) (c + d R0), and central differences of it."""
    x, g = drawn(3, 256)
    values = scalars(0.07, 1.3, 0.8)
    geta.quantize(x, *values).backward(g)

    def frozen(d: Tensor, q: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            c = torch.minimum(x.abs(), values[1]).pow(values[2])
            rest = torch.round(c / values[0]) - c / values[0]
        inside = x.abs() < q
        c = torch.where(inside, x.abs().clamp_min(1e-300).pow(t), q.pow(t))
        return (g * x.sign() * (c + d * rest)).sum()

    again = [v.detach().clone().requires_grad_() for v in values]
    frozen(*again).backward()
    for index, (a, b) in enumerate(zip(values, again, strict=True)):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=0.0)
        ends = []
        for h in (1e-6, -1e-6):
            moved = [v.detach() + (h if i == index else 0.0) for i, v in enumerate(values)]
            ends.append(float(frozen(*moved)))
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float(a.grad), rel=1e-4)
    assert torch.autograd.gradcheck(frozen, again)


def test_the_mapped_slope_is_the_derivative_of_the_mapping() -> None:
    x = torch.tensor([0.0, 0.3, -0.7, 2.0], dtype=torch.float64, requires_grad=True)
    geta.quantize(x, *scalars(0.1, 1.0, 1.5), geta.Slope.MAPPED).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([1.0, 1.5 * 0.3**0.5, 1.5 * 0.7**0.5, 0.0])


@pytest.mark.parametrize("t", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("bits", range(2, 17))
def test_bits_and_step_are_inverse_and_codes_fit(bits: int, t: float) -> None:
    """A3."""
    q = torch.tensor(1.7, dtype=torch.float64)
    exponent = torch.tensor(t, dtype=torch.float64)
    assert float(geta.bits_of(geta.step_of(bits, q, exponent), q, exponent)) == pytest.approx(bits, abs=1e-9)
    quantizer = geta.Quantizer(1.7, bits)
    with torch.no_grad():
        quantizer.exponent.fill_(t)
        quantizer.set_bits_(bits)
    codes = quantizer.codes(torch.linspace(-3, 3, 1001))
    assert int(codes.abs().max()) == 2 ** (bits - 1) - 1
    torch.testing.assert_close(codes * quantizer.step, quantizer(torch.linspace(-3, 3, 1001)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x", [[0.0, 0.0], [1.0, -1.0], [5.0, -5.0]])
def test_zero_the_edge_and_saturation_give_finite_gradients(x: list[float], dtype: torch.dtype) -> None:
    value = torch.tensor(x, dtype=dtype, requires_grad=True)
    quantizer = geta.Quantizer(1.0, 4)
    y = quantizer(value)
    y.sum().backward()
    found = [value, quantizer.step, quantizer.limit, quantizer.exponent]
    assert y.dtype == dtype and all(p.grad is not None and p.grad.isfinite().all() for p in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_quantized_in_float32(dtype: torch.dtype) -> None:
    """In bfloat16 itself c / d would be rounded to 8 bits before it is rounded to a code."""
    x = torch.randn(1000).to(dtype)
    halves, floats = x.clone().requires_grad_(), x.float().requires_grad_()
    one, other = geta.Quantizer(2.0, 9), geta.Quantizer(2.0, 9)
    y, z = one(halves), other(floats)
    assert torch.equal(y, z.to(dtype)) and torch.equal(one.codes(x), other.codes(x.float()))
    y.backward(x)
    z.backward(x.float())
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert halves.grad is not None and floats.grad is not None and torch.equal(halves.grad, floats.grad.to(dtype))


def test_an_all_zero_weight_is_quantized() -> None:
    layer = nn.Sequential(nn.Linear(3, 4))
    nn.init.zeros_(layer[0].weight)
    geta.quantize_(layer)
    assert layer(torch.ones(2, 3)).isfinite().all()


@pytest.mark.parametrize("limit, bits", [(float("nan"), 8), (float("inf"), 8), (1.0, 1.0), (1.0, 25)])
def test_ranges_that_cannot_be_are_named(limit: float, bits: float) -> None:
    with pytest.raises(SpecError, match="Quantizer"):
        geta.Quantizer(limit, bits)


def test_quantize_keeps_names_and_leaves_a_tied_head() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(5, 8), nn.Conv1d(8, 8, 1), nn.Linear(8, 5, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    names = set(model.state_dict())
    layers = geta.quantize_(model)
    assert set(layers) == {"body"} and names <= set(model.state_dict())
    assert isinstance(model.body, nn.Conv1d)
    with pytest.raises(ConversionError, match="no layer"):
        geta.quantize_(nn.Sequential(nn.Tanh()))
    with pytest.raises(ConversionError, match="Tanh cannot be quantized"):
        geta.quantize_(nn.Sequential(nn.Tanh()), lambda name, module: isinstance(module, nn.Tanh))


def test_calibrated_inputs_are_hardly_ever_clipped() -> None:
    """A18: less than 1 % of held-out inputs are beyond the range."""
    noise = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    geta.quantize_(model, activations=True)
    geta.calibrate_(model, [torch.randn(256, 16, generator=noise) * 7 for _ in range(4)])
    x = torch.randn(1000, 16, generator=noise) * 7
    hidden = model[1](model[0](x))
    for layer, value in ((model[0], x), (model[2], hidden)):
        assert isinstance(layer, geta.QuantizedLayer) and layer.input_quantizer is not None
        assert (value.abs() >= layer.input_quantizer.limit).float().mean() < 0.01
    with pytest.raises(ConversionError, match="no batch"):
        geta.calibrate_(model, [])
