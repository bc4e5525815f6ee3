# SPDX-License-Identifier: Apache-2.0
"""quantize() against the float64 oracle, and U1, U2, U3, U6, U10, U12 of the linear-quantization study."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from lowbits.errors import ShapeError, SpecError
from lowbits.formats import E4M3, INT4, INT8, NF4, TERNARY, UINT8, UINT8_NO_ZERO
from lowbits.quantizers import (
    NVFP4_SIGNS,
    AbsMean,
    Amax,
    Asymmetric,
    Hadamard,
    Noise,
    PerBlock,
    PerColumn,
    PerGroup,
    PerRow,
    PerTensor,
    PerTile,
    PowerOfTwo,
    QuantSpec,
    Rounding,
    StudyAsymmetric,
    TwoLevel,
    quantize,
)  # fmt: skip
from tests.oracles import linear_quantizer as oracle

GRANULARITIES = {
    "tensor": (PerTensor(), (1, 1)), "row": (PerRow(), (1, 1)), "column": (PerColumn(), (1, 1)),
    "group": (PerGroup(4), (1, 4)), "block": (PerBlock(5), (1, 5)), "tile": (PerTile(2, 4), (2, 4)),
}  # fmt: skip
FORMATS = {8: INT8, 4: INT4}
values = st.floats(-(2.0**127), 2.0**127, width=32) | st.floats(-4, 4, width=32)
matrices = arrays(np.float32, st.sampled_from([(2, 4), (4, 8), (6, 12)]), elements=values)


def as_float(x: np.ndarray) -> list[list[float]]:
    return x.astype(np.float64).tolist()


@given(matrices, st.sampled_from(sorted(GRANULARITIES)), st.sampled_from([8, 4]), st.sampled_from([0.0, 1e-5]))
def test_symmetric_equals_the_oracle_bit_for_bit(x, kind, bits, floor):
    granularity, size = GRANULARITIES[kind]
    q = quantize(torch.from_numpy(x), QuantSpec(FORMATS[bits], granularity, Amax(floor)))
    rows, x_hat = as_float(x), q.dequantize()
    for cells in oracle.groups(x.shape, kind, size):
        high = 2 ** (bits - 1) - 1
        codes, scale = oracle.symmetric([rows[r][c] for r, c in cells], -high - 1, high, float(np.float32(floor)))
        assert [q.values[cell].item() for cell in cells] == codes
        assert [x_hat[cell].item() for cell in cells] == [oracle.f32(code * scale) for code in codes]


@given(matrices, st.sampled_from(["tensor", "row", "column", "group"]), st.sampled_from([8, 4]))
def test_asymmetric_equals_the_oracle_bit_for_bit(x, kind, bits):
    x = np.clip(x, -1e30, 1e30)  # a range beyond float32 is an infinite scale, tested below
    granularity, size = GRANULARITIES[kind]
    high = 2 ** (bits - 1) - 1
    rows = as_float(x)
    full = quantize(torch.from_numpy(x), QuantSpec(FORMATS[bits], granularity, Asymmetric()))
    study = quantize(torch.from_numpy(x), QuantSpec(FORMATS[bits], granularity, StudyAsymmetric(1e-5)))
    for cells in oracle.groups(x.shape, kind, size):
        group = [rows[r][c] for r, c in cells]
        assert [full.values[cell].item() for cell in cells] == oracle.asymmetric(group, -high - 1, high)[0]
        assert [study.values[cell].item() for cell in cells] == oracle.asymmetric_study(group, -high - 1, high, 1e-5)[0]


def test_asymmetric_uses_all_codes_and_the_study_variant_wastes_two():
    x = torch.linspace(-3.0, 5.0, 1001)[None]
    ours = quantize(x, QuantSpec(INT8, PerTensor(), Asymmetric())).values
    study = quantize(x, QuantSpec(INT8, PerTensor(), StudyAsymmetric())).values
    assert (ours.min(), ours.max()) == (-128, 127)
    assert (study.min(), study.max()) == (-128, 126)


@given(matrices, st.sampled_from(sorted(GRANULARITIES)), st.sampled_from([8, 4]), st.integers(-3, 3))
def test_u1_bound_idempotence_scaling_and_symmetry(x, kind, bits, exponent):
    x = np.where(np.abs(x) < 1e-30, 0, np.clip(x, -1e30, 1e30)).astype(np.float32)  # powers of two stay exact
    granularity, _ = GRANULARITIES[kind]
    spec = QuantSpec(FORMATS[bits], granularity)
    tensor = torch.from_numpy(x)
    q = quantize(tensor, spec)
    x_hat = q.dequantize()
    half_step = (granularity.view(torch.ones_like(tensor))[0] * q.scale / 2).double()
    half_step = half_step.reshape(-1)[: tensor.numel()].view_as(tensor)
    assert ((x_hat.double() - tensor.double()).abs() <= half_step * (1 + 1e-6)).all()
    assert q.values.abs().max() <= 2 ** (bits - 1) - 1
    assert torch.equal(quantize(x_hat, spec).dequantize(), x_hat)
    assert torch.equal(quantize(tensor * 2.0**exponent, spec).dequantize(), x_hat * 2.0**exponent)
    assert torch.equal(quantize(-tensor, spec).dequantize(), -x_hat)


RULES = [Amax(), Amax(1e-5), PowerOfTwo(), AbsMean(), Asymmetric(), StudyAsymmetric()]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_u2_degenerate_groups_stay_finite_and_zeros_stay_zero(rule, dtype):
    x = torch.zeros(4, 3, dtype=dtype)
    x[1] = torch.tensor([1.0, 0.0, -2.0])
    x[2] = torch.tensor([1e-7, 0.0, 3e-8]) if dtype is torch.float16 else torch.tensor([1e-45, 0.0, -1e-39])
    for part in (x, x[:1], x[1:2], x[:, :1], x[2:3]):
        x_hat = quantize(part, QuantSpec(INT8, PerRow(), rule)).dequantize()
        assert x_hat.isfinite().all()
        assert (x_hat[part == 0] == 0).all()


def test_u2_whatever_is_not_finite_makes_its_group_nan_and_no_other():
    for bad in (math.nan, math.inf, -math.inf):
        for rule in RULES:
            x = torch.ones(3, 4)
            x[1, 2] = bad
            x_hat = quantize(x, QuantSpec(INT8, PerRow(), rule)).dequantize()
            assert x_hat[1].isnan().all(), (bad, rule)
            assert x_hat[[0, 2]].isfinite().all()
            packed = quantize(x, QuantSpec(INT8, PerRow(), rule)).pack().unpack().dequantize()
            assert packed[1].isnan().all()


@pytest.mark.parametrize(("granularity", "changes"), [(PerRow(), 0), (PerTensor(), 1), (PerColumn(), 1)])
def test_u3_rows_are_independent_only_under_row_scales(granularity, changes):
    x = torch.randn(6, 8)
    louder = x.clone()
    louder[2] *= 1e3
    for flip in (False, True):  # the same for columns, with the axes exchanged
        one, two = (x.t(), louder.t()) if flip else (x, louder)
        kind = {PerRow(): PerColumn(), PerColumn(): PerRow()}.get(granularity, granularity) if flip else granularity
        before, after = (quantize(t, QuantSpec(INT8, kind)).values for t in (one, two))
        others = [i for i in range(6) if i != 2]
        before, after = (before.t()[others], after.t()[others]) if flip else (before[others], after[others])
        assert bool((before != after).any()) == bool(changes)


@pytest.mark.parametrize("kind", sorted(GRANULARITIES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_u6_arithmetic_is_float32_whatever_the_input(kind, dtype):
    x = torch.randn(64, 48).to(dtype)
    spec = QuantSpec(INT8, GRANULARITIES[kind][0])
    assert torch.equal(quantize(x, spec).values, quantize(x.float(), spec).values)
    assert torch.equal(quantize(x, spec).scale, quantize(x.float(), spec).scale)


@given(array_shapes(min_dims=2, max_dims=2, max_side=13), st.sampled_from([INT8, INT4, TERNARY, E4M3, NF4, UINT8]))
def test_u10_packed_tensors_round_trip_and_count_their_bytes(shape, fmt):
    x = torch.randn(shape)
    q = quantize(x, QuantSpec(fmt, PerRow()))
    packed = q.pack()
    assert torch.equal(packed.unpack().dequantize(), q.dequantize())
    count = x.numel()
    code_bytes = {8: count, 4: -(-count // 2), 2: -(-count // 5)}[fmt.bits]  # ternary takes five codes a byte
    assert packed.nbytes() == code_bytes + 4 * shape[0]


def test_u12_signed_second_moments_lose_a_sixth_of_their_entries_and_no_zero_codes_none():
    v = torch.randn(2000, 768).square()
    zeros = (quantize(v, QuantSpec(INT8, PerRow())).values == 0).float().mean()
    assert 0.16 < zeros < 0.18
    assert (quantize(v, QuantSpec(UINT8_NO_ZERO, PerRow())).values >= 1).all()


def test_power_of_two_scales_are_the_smallest_that_hold():
    x = torch.randn(100, 32) * torch.exp2(torch.randint(-30, 30, (100, 1)).float())
    x[0, 0], x[0, 1:] = 127.0, 0.0  # exactly representable at scale 1
    q = quantize(x, QuantSpec(INT8, PerRow(), PowerOfTwo()))
    mantissa, _ = torch.frexp(q.scale)
    assert (mantissa == 0.5).all()
    amax = x.abs().amax(1, keepdim=True)
    assert (amax <= 127 * q.scale).all() and (amax > 127 * q.scale / 2).all()
    assert q.scale[0] == 1.0


def test_absmean_ternary_is_bitnet_b158():
    w = torch.randn(16, 64)
    gamma = w.abs().mean()
    q = quantize(w, QuantSpec(TERNARY, PerTensor(), AbsMean()))
    assert torch.equal(q.values, (w / gamma).round().clamp(-1, 1))  # eq. 1 to 3
    assert q.scale.item() == gamma.item()


def test_hadamard_is_orthonormal_and_cancels_in_a_product():
    for transform in (Hadamard(16), Hadamard.random(8, seed=3), Hadamard(16, signs=NVFP4_SIGNS)):
        eye = torch.eye(transform.size)
        torch.testing.assert_close(transform.forward(eye) @ transform.forward(eye).t(), eye, rtol=0, atol=1e-6)
        x, w = torch.randn(5, 33), torch.randn(7, 33)  # one past two groups
        assert transform.forward(x).shape == (5, transform.padded(33))
        torch.testing.assert_close(transform.inverse(transform.forward(x))[..., :33], x)
        torch.testing.assert_close(transform.forward(x) @ transform.forward(w).t(), x @ w.t())
    eye = torch.eye(8)
    assert not torch.equal(Hadamard.random(8, seed=3).forward(eye), Hadamard.random(8, seed=4).forward(eye))
    with pytest.raises(SpecError, match="16 numbers 1 or -1"):
        Hadamard(16, signs=(1, -1))


def test_hadamard_spreads_an_outlier():
    x = torch.randn(64, 64)
    x[:, 5] *= 100
    plain, rotated = (
        (quantize(x, QuantSpec(INT8, PerRow(), transform=t)).dequantize() - x).norm() for t in (None, Hadamard(64))
    )
    assert rotated < plain / 2


def test_stochastic_rounding_is_unbiased():
    n = 1 << 16
    x = torch.full((n + 1,), 0.3)
    x[-1] = 7.0  # fixes the scale at 1
    noise = Noise.of(0, "x", "test").uniform(x.shape, step=1)
    q = quantize(x, QuantSpec(INT4, rounding=Rounding.STOCHASTIC), noise)
    assert abs(q.values[:n].mean().item() - 0.3) < 4 * (0.3 * 0.7 / n) ** 0.5  # four standard errors


def test_errors_name_the_rule_and_the_remedy():
    x = torch.randn(3, 10)
    with pytest.raises(ShapeError, match="zeros that fill up .* would count"):
        quantize(x, QuantSpec(INT8, PerGroup(4), AbsMean()))
    with pytest.raises(SpecError, match="symmetric about 0, got int8"):
        QuantSpec(INT8, PerGroup(4), TwoLevel())
    with pytest.raises(ShapeError, match="at least one element"):
        quantize(torch.empty(0, 4), QuantSpec(INT8))
    with pytest.raises(SpecError, match="takes noise"):
        quantize(x, QuantSpec(INT8, rounding=Rounding.STOCHASTIC))
    with pytest.raises(SpecError, match="takes none"):
        quantize(x, QuantSpec(INT8), torch.rand(3, 10))
    with pytest.raises(SpecError, match="floating point"):
        quantize(torch.ones(3, dtype=torch.int32), QuantSpec(INT8))
    with pytest.raises(SpecError, match="integer format"):
        QuantSpec(E4M3, scale=Asymmetric())
    with pytest.raises(SpecError, match="at least 1"):
        PerGroup(0)
    with pytest.raises(SpecError, match="power of two"):
        Hadamard(12)


def test_transposed_views_quantize_like_copies():
    x = torch.randn(12, 20)
    for kind in (PerTensor(), PerRow(), PerColumn(), PerGroup(4), PerTile(4, 4), PerBlock(7)):
        spec = QuantSpec(INT8, kind)
        view, copy = quantize(x.t(), spec), quantize(x.t().contiguous(), spec)
        assert torch.equal(view.dequantize(), copy.dequantize())
        assert torch.equal(view.pack().codes, copy.pack().codes)
