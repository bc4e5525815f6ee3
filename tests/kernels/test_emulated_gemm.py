# SPDX-License-Identifier: Apache-2.0
"""The simulated GEMM multiplies what block-scaled tensor cores multiply; only the order of sums differs (C5).

Why: every E2M1 times E4M3 is a bfloat16 number, the product of two such is exact in float32, and so is the sum of 16 of
them. What rounds is the sum over blocks, and the scale of the tensor behind it.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbits.formats import E2M1, E2M3, E3M2, E4M3, E5M2
from lowbits.kernels import scaled_mm
from lowbits.quantizers import (
    NVFP4_SIGNS,
    Hadamard,
    Microscaling,
    PerGroup,
    PerRow,
    PerTensor,
    PerTile,
    PowerOfTwo,
    QTensor,
    QuantSpec,
    ReciprocalAmax,
    TwoLevel,
    quantize,
)  # fmt: skip
from tests.oracles import nvfp4 as oracle

ROW, TILE = QuantSpec(E2M1, PerGroup(16), TwoLevel()), QuantSpec(E2M1, PerTile(16, 16), TwoLevel())
RHT = Hadamard(16, signs=NVFP4_SIGNS, dtype=torch.bfloat16)
POWER = TwoLevel(power_of_two=True)
# Left and right operand.
PAIRS = {
    "nvfp4": (ROW, TILE),
    "nvfp4 rotated": (QuantSpec(E2M1, PerGroup(16), TwoLevel(), transform=RHT),) * 2,
    "nvfp4 powers of two": (QuantSpec(E2M1, PerGroup(16), POWER), QuantSpec(E2M1, PerTile(16, 16), POWER)),
    "mxfp4": (QuantSpec(E2M1, PerGroup(32), Microscaling()), QuantSpec(E2M1, PerTile(32, 32), Microscaling())),
    "mxfp6 e2m3": (QuantSpec(E2M3, PerGroup(32), Microscaling()),) * 2,
    "mxfp6 e3m2": (QuantSpec(E3M2, PerGroup(32), Microscaling()),) * 2,
    "mxfp8": (QuantSpec(E4M3, PerGroup(32), Microscaling()),) * 2,
    "fp8 tensor": (QuantSpec(E5M2, PerTensor(), ReciprocalAmax()), QuantSpec(E4M3, PerTensor(), ReciprocalAmax())),
    "fp8 row": (QuantSpec(E4M3, PerRow(), ReciprocalAmax()),) * 2,
    "fp8 block": (QuantSpec(E4M3, PerGroup(128), PowerOfTwo()), QuantSpec(E4M3, PerTile(128, 128), PowerOfTwo())),
}  # fmt: skip
EVERY_PAIR = pytest.mark.parametrize("pair", list(PAIRS))


def as_encoded(q: QTensor) -> oracle.Encoded:
    """The numbers of a `QTensor` of a matrix in the oracle's form."""
    rows, columns = q.values.shape
    scale, block = q.scale.numpy(), (1, columns)
    match q.spec.granularity:
        case PerTensor():
            block = (rows, columns)
        case PerGroup(size):
            scale, block = scale.squeeze(-1), (1, size)
        case PerTile(height, width):
            scale, block = scale.squeeze(-1).squeeze(-2), (height, width)
    return oracle.Encoded(q.values.numpy(), scale, np.float32(1 if q.outer is None else q.outer.item()), block)


def operands(pair: str, m: int, k: int, n: int, seed: int, spread: float = 0.0) -> tuple[QTensor, QTensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        x, tail = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        return x * torch.exp(spread * tail)

    left, right = PAIRS[pair]
    return quantize(draw(m, k), left), quantize(draw(n, k), right)


def magnitudes(a: QTensor, b: QTensor) -> np.ndarray:
    """M = |X| |W|, the scale of the specification's bounds."""
    return (a.rotated().double().abs() @ b.rotated().double().abs().t()).numpy()


# The enumeration.


def finite(values: tuple[float, ...]) -> list[float]:
    return [v for v in values if math.isfinite(v)]


def products() -> Tensor:
    pairs = itertools.product(finite(E2M1.code_values), finite(E4M3.code_values))
    return torch.tensor([value * scale for value, scale in pairs], dtype=torch.float64)


def test_c5_the_4064_products_are_bf16_numbers():
    p = products()
    assert p.numel() == 4064
    for dtype, exact in ((torch.bfloat16, 4064), (torch.float16, 4064)):
        assert (p.to(dtype).double() == p).sum() == exact
    assert (E4M3.project(p.float()).double() == p).sum() == 2964
    assert (E5M2.project(p.float()).double() == p).sum() == 1824
    sizes = p.abs().unique()
    assert len(sizes) == 238 and sizes[1] == 2**-10 and sizes[-1] == 2688
    mantissa, _ = torch.frexp(sizes)
    assert torch.equal(mantissa * 64, (mantissa * 64).round())  # at most 6 significant bits


def test_c5_products_of_two_are_exact_in_float32():
    sizes = products().abs().unique()
    both = torch.outer(sizes, sizes)
    assert torch.equal(both.float().double(), both)
    assert both[both > 0].min() == 2**-20 and both.max() == 2688**2


@given(st.integers(0, 2**32 - 1))
def test_c5_sums_within_a_block_are_exact_in_any_order(seed):
    random = np.random.default_rng(seed)
    values = random.choice(np.concatenate([oracle.E2M1, -oracle.E2M1]), (2, 16))
    scale_a, scale_b = random.choice(oracle.E4M3, 2)
    terms = (values[0] * scale_a) * (values[1] * scale_b)
    total = np.float32(0)
    for term in random.permutation(terms):
        total = np.float32(total + np.float32(term))
    assert float(total) == (values[0] @ values[1]) * scale_a * scale_b


# The GEMM.


@EVERY_PAIR
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (16, 16, 16), (33, 65, 17), (40, 128, 24), (19, 300, 31)])
@pytest.mark.parametrize("spread", [0.0, 2.0], ids=["gaussian", "heavy tails"])
def test_c5_float32_result_against_the_blockwise_reference(pair, shape, spread):
    a, b = operands(pair, *shape, seed=0, spread=spread)
    exact = oracle.blockwise_product(as_encoded(a), as_encoded(b))
    got = scaled_mm(a, b, torch.float32)
    assert got.dtype == torch.float32
    assert (np.abs(got.double().numpy() - exact) <= 1e-6 * magnitudes(a, b)).all()


@EVERY_PAIR
@pytest.mark.parametrize("spread", [0.0, 2.0], ids=["gaussian", "heavy tails"])
def test_c5_long_contractions(pair, spread):
    a, b = operands(pair, 32, 4096, 48, seed=1, spread=spread)
    exact = oracle.blockwise_product(as_encoded(a), as_encoded(b))
    got = scaled_mm(a, b, torch.float32).double().numpy()
    assert (np.abs(got - exact) <= 1e-6 * magnitudes(a, b)).all()
    rounded = scaled_mm(a, b, torch.bfloat16)
    equal = (rounded == torch.from_numpy(exact).float().bfloat16()).float().mean()
    assert equal >= 0.999  # G2; what differs lies within the bound of where bf16 rounds the other way


@EVERY_PAIR
def test_bf16_results_are_rounded_once(pair):
    a, b = operands(pair, 24, 150, 18, seed=2)
    rounded = scaled_mm(a, b, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    exact = oracle.blockwise_product(as_encoded(a), as_encoded(b))
    # Half a unit of bf16's last place is at most 2^-8 of the number; then the float32 sum's bound.
    bound = 2.0**-8 * np.abs(exact) + 1e-6 * magnitudes(a, b)
    assert (np.abs(rounded.double().numpy() - exact) <= bound).all()


@EVERY_PAIR
def test_what_is_multiplied_is_exact_in_bf16(pair):
    for q in operands(pair, 21, 90, 35, seed=3, spread=1.0):
        inner, outer = q.factors()
        assert torch.equal(inner.bfloat16().float(), inner)
        whole = inner if outer is None else inner * outer
        assert torch.equal(whole, q.rotated())
        assert (outer is None) == (pair.startswith("mx") or pair in ("nvfp4 powers of two", "fp8 block"))


def test_tensor_scales_inside_the_operands_would_not_be():
    for q in operands("nvfp4", 64, 64, 64, seed=4):
        whole = q.rotated()
        inexact = (whole.bfloat16().float() != whole)[whole != 0]
        assert inexact.float().mean() > 0.95  # section 2.10, 3


@given(
    st.integers(-60, 60), st.integers(-60, 60), st.sampled_from(["nvfp4", "nvfp4 powers of two", "mxfp4", "fp8 row"])
)
@settings(max_examples=40)
def test_powers_of_two_pass_through_unchanged(left, right, pair):
    generator = torch.Generator().manual_seed(5)
    x, w = torch.randn(6, 40, generator=generator), torch.randn(9, 40, generator=generator)
    lhs, rhs = PAIRS[pair]
    if pair == "fp8 row":  # whose floor is 1e-12
        left, right = max(left, -30), max(right, -30)
    plain = scaled_mm(quantize(x, lhs), quantize(w, rhs), torch.float32)
    moved = scaled_mm(quantize(x * 2.0**left, lhs), quantize(w * 2.0**right, rhs), torch.float32)
    assert torch.equal(moved, plain * 2.0 ** (left + right))


def test_gradients_as_small_as_1e_minus_20_survive():
    generator = torch.Generator().manual_seed(6)
    g, w = 1e-20 * torch.randn(8, 64, generator=generator), torch.randn(64, 64, generator=generator)
    got = scaled_mm(quantize(g, ROW), quantize(w.t(), TILE), torch.bfloat16).float()
    assert (got - g @ w).norm() < 0.25 * (g @ w).norm()  # 0.095 and 0.111 of error in the operands, no underflow


@pytest.mark.parametrize("pair", ["nvfp4", "nvfp4 powers of two"])
def test_an_operand_in_high_precision_meets_the_decoded_one(pair):
    a, b = operands(pair, 6, 50, 9, seed=7)
    x = torch.randn(6, 50, generator=torch.Generator().manual_seed(8))
    got = scaled_mm(x, b, torch.float32)
    bound = 1e-6 * (x.double().abs() @ b.rotated().double().abs().t())
    assert ((got.double() - x.double() @ b.rotated().double().t()).abs() <= bound).all()
    other = scaled_mm(a, b.dequantize(), torch.float32)
    assert (np.abs(other.double().numpy() - oracle.blockwise_product(as_encoded(a), as_encoded(b)))
            <= 1e-6 * magnitudes(a, b)).all()  # fmt: skip


def test_a_rotation_on_one_side_is_undone_first():
    rotated, plain = PAIRS["nvfp4 rotated"][0], ROW
    generator = torch.Generator().manual_seed(9)
    x, w = torch.randn(7, 45, generator=generator), torch.randn(5, 45, generator=generator)
    a, b = quantize(x, rotated), quantize(w, plain)
    expected = a.dequantize().double() @ b.dequantize().double().t()
    got = scaled_mm(a, b, torch.float32)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4)
