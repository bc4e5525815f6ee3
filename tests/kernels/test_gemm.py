# SPDX-License-Identifier: Apache-2.0
"""scaled_mm: simulated and native give the product of the decoded operands; illegal scales are refused (U8, U13)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowbits.errors import NativeError
from lowbits.formats import E2M1, E4M3, E5M2, INT4, INT8, TERNARY, UINT8
from lowbits.kernels import Coded, illegal_on_hardware, missing_unit, scaled_mm
from lowbits.nn import Execution, Gemm, Recipe
from lowbits.quantizers import (
    Amax,
    Asymmetric,
    Hadamard,
    PerColumn,
    PerGroup,
    PerRow,
    PerTensor,
    PerTile,
    PowerOfTwo,
    QuantSpec,
    quantize,
)  # fmt: skip

CPU = torch.device("cpu")
LEGAL = [
    (QuantSpec(INT8, PerRow()), QuantSpec(INT8, PerRow())),
    (QuantSpec(INT8), QuantSpec(INT8, PerRow())),
    (QuantSpec(INT8, PerRow()), QuantSpec(INT4)),
    (QuantSpec(TERNARY, PerRow(), PowerOfTwo()), QuantSpec(INT8)),
]


@pytest.mark.parametrize(("lhs", "rhs"), LEGAL, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (33, 65, 17), (64, 96, 128)])
def test_u8_int8_gemm_equals_the_decoded_float64_product(lhs, rhs, shape):
    m, k, n = shape
    a, b = quantize(torch.randn(m, k), lhs), quantize(torch.randn(n, k), rhs)
    exact = (a.values.double() * a.scale.double()) @ (b.values.double() * b.scale.double()).t()
    native = scaled_mm(Coded.of(a), Coded.of(b), torch.float32)
    # The int32 sum is exact; converting it and two products with scales round three times: 3 * 2^-24.
    torch.testing.assert_close(native.double(), exact, rtol=3 * 2**-24, atol=1e-30)
    simulated = scaled_mm(a, b, torch.float32)
    # Decoding rounds each operand once (2 * 2^-24) and k products are summed in any order: gamma_k.
    bound = (k + 3) * 2**-24 * (a.rotated().double().abs() @ b.rotated().double().abs().t())
    assert ((simulated.double() - exact).abs() <= bound + 1e-30).all()


def test_integer_sums_that_could_overflow_are_refused():
    q = Coded.of(quantize(torch.ones(1, 131_072), QuantSpec(INT8)))
    with pytest.raises(NativeError, match="overflow"):
        scaled_mm(q, q, torch.float32)


ROW = QuantSpec(INT8, PerRow())
ILLEGAL = [
    (None, ROW, "high precision"), (ROW, None, "high precision"),
    (QuantSpec(INT8, PerColumn()), ROW, "along the contraction"),
    (ROW, QuantSpec(INT8, PerGroup(8)), "along the contraction"),
    (QuantSpec(E4M3, PerTile(8, 8)), QuantSpec(E4M3), "along the contraction"),
    (QuantSpec(INT8, PerRow(), Asymmetric()), ROW, "zero point"), (QuantSpec(UINT8), ROW, "signed 8-bit"),
    (QuantSpec(E4M3), ROW, "no unit"), (QuantSpec(E2M1), QuantSpec(E2M1), "no unit"),
    (QuantSpec(INT8, transform=Hadamard(8)), ROW, "rotated differently"),
]  # fmt: skip


@pytest.mark.parametrize(("lhs", "rhs", "why"), ILLEGAL, ids=str)
def test_u13_native_is_refused_not_simulated(lhs, rhs, why):
    assert why in illegal_on_hardware(lhs, rhs)
    with pytest.raises(NativeError, match=why):
        Recipe(fprop=Gemm(lhs, rhs), execution=Execution.NATIVE)
    assert not Recipe(fprop=Gemm(lhs, rhs), execution=Execution.AUTO).native(CPU)[0]
    a, b = (torch.randn(8, 16) if spec is None else quantize(torch.randn(8, 16), spec) for spec in (lhs, rhs))
    assert scaled_mm(a, b, torch.float32).shape == (8, 8)


def test_fp8_is_legal_on_hardware_but_a_cpu_has_no_unit():
    lhs, rhs = QuantSpec(E4M3), QuantSpec(E5M2)
    assert illegal_on_hardware(lhs, rhs) is None and "no FP8 GEMM" in missing_unit(lhs, CPU)
    with pytest.raises(NativeError, match="no FP8 GEMM"):
        Recipe(fprop=Gemm(lhs, rhs), execution=Execution.NATIVE).native(CPU)
    auto = Recipe(fprop=Gemm(lhs, rhs), execution=Execution.AUTO)
    assert auto.native(CPU) == (False, False, False) and auto.runs(CPU) == "simulated: cpu has no FP8 GEMM"


def test_each_gemm_for_itself():
    column = QuantSpec(INT8, PerColumn())
    auto = Recipe(fprop=Gemm(ROW, ROW), wgrad=Gemm(column, ROW), execution=Execution.AUTO)
    assert auto.native(CPU) == (True, False, False)
    assert auto.runs(CPU).startswith("native fprop alone: the scales of `int8 column` vary along the contraction")
    assert Recipe().runs(CPU) == replace(auto, execution=Execution.SIMULATED).runs(CPU) == "simulated"
    assert replace(auto, wgrad=Gemm()).runs(CPU) == "native"


def test_hadamard_on_both_operands_cancels_and_on_one_is_undone():
    x, w = torch.randn(9, 32), torch.randn(5, 32)
    rotated, plain = QuantSpec(INT8, PerRow(), transform=Hadamard(16)), QuantSpec(INT8, PerRow(), Amax())
    for lhs, rhs in ((rotated, rotated), (rotated, plain)):
        a, b = quantize(x, lhs), quantize(w, rhs)
        expected = a.dequantize() @ b.dequantize().t()
        torch.testing.assert_close(scaled_mm(a, b, torch.float32), expected, rtol=1e-4, atol=1e-4)
        assert (scaled_mm(a, b, torch.float32) - x @ w.t()).norm() < 0.03 * (x @ w.t()).norm()


def test_granularity_of_a_tensor_is_legal_for_both_sides():
    assert illegal_on_hardware(QuantSpec(INT8, PerTensor()), QuantSpec(INT4, PerTensor())) is None


@pytest.mark.gpu
@pytest.mark.parametrize("formats", [(E4M3, E4M3), (E5M2, E4M3), (INT8, INT8)], ids=str)
@pytest.mark.parametrize("granularity", [PerTensor(), PerRow()], ids=str)
def test_native_gemms_on_the_gpu(formats, granularity):
    x, w = torch.randn(100, 72, device="cuda"), torch.randn(40, 72, device="cuda")
    a, b = (quantize(t, QuantSpec(f, granularity)) for t, f in zip((x, w), formats, strict=True))
    exact = a.rotated().double() @ b.rotated().double().t()
    native = scaled_mm(Coded.of(a), Coded.of(b), torch.bfloat16)
    # bf16 rounds the result once (2^-9); FP8 units of Hopper sum with 14 bits or more.
    bound = 2**-8 * exact.abs() + 72 * 2**-13 * (a.rotated().double().abs() @ b.rotated().double().abs().t())
    assert ((native.double() - exact).abs() <= bound).all()
