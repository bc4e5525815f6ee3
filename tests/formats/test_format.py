# SPDX-License-Identifier: Apache-2.0
"""Formats against exact arithmetic, the specifications' tables and ml_dtypes."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbits.errors import FormatError
from lowbits.formats import (
    ALL,
    BF16,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E4M3_NO_UNDERFLOW,
    E5M2,
    E8M0,
    INT4,
    INT8,
    NF4,
    TERNARY,
    UINT8_NO_ZERO,
    Codebook,
    FloatFormat,
    IntFormat,
)
from tests.oracles.number_formats import float_grid, nearest, round_float

# name, exponent bits, mantissa bits, bias, largest value: OCP OFP8 1.0 tables 1-2, OCP MX 1.0 tables 1-6.
SPECIFIED = [
    (E4M3, 4, 3, 7, 448.0), (E5M2, 5, 2, 15, 57344.0),
    (E3M2, 3, 2, 3, 28.0), (E2M3, 2, 3, 1, 7.5), (E2M1, 2, 1, 1, 6.0),
]  # fmt: skip
GRIDS = {fmt.name: (fmt, float_grid(e, m, b, top)) for fmt, e, m, b, top in SPECIFIED}
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def f32(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize("name", GRIDS)
def test_grid_is_the_specified_one(name):
    fmt, grid = GRIDS[name]
    expected = sorted({float(g) for g in grid} | {-float(g) for g in grid})
    assert fmt.values().tolist() == expected


@given(st.sampled_from(sorted(GRIDS)), st.floats(-1e6, 1e6, width=32) | floats, st.integers(-12, 12))
def test_float_rounding_is_nearest_even(name, x, exponent):
    fmt, grid = GRIDS[name]
    for value in (x, math.ldexp(x % 1.0, exponent)):
        value = float(np.float32(value))
        got = fmt.project(f32(value)).item()
        assert got == round_float(value, grid)
        assert math.copysign(1, got) == math.copysign(1, value)


@pytest.mark.parametrize("name", GRIDS)
def test_ties_and_their_neighbours(name):
    fmt, grid = GRIDS[name]
    middles = np.array([float((a + b) / 2) for a, b in zip(grid, grid[1:], strict=False)], dtype=np.float32)
    for x in (middles, np.nextafter(middles, np.float32(np.inf)), np.nextafter(middles, np.float32(0))):
        assert fmt.project(torch.from_numpy(x)).tolist() == [round_float(float(v), grid) for v in x]


CASTS = [(E4M3, ml_dtypes.float8_e4m3fn), (E5M2, ml_dtypes.float8_e5m2), (E3M2, ml_dtypes.float6_e3m2fn),
         (E2M3, ml_dtypes.float6_e2m3fn), (E2M1, ml_dtypes.float4_e2m1fn)]  # fmt: skip


@pytest.mark.parametrize(("fmt", "dtype"), CASTS, ids=lambda p: getattr(p, "name", ""))
def test_codes_equal_ml_dtypes(fmt, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50_000, generator=generator) * torch.exp2(
        torch.randint(-20, 18, (50_000,), generator=generator).float()
    )
    cast = x.clamp(fmt.min, fmt.max).numpy().astype(dtype)  # ml_dtypes does not saturate
    projected = fmt.project(x)
    np.testing.assert_array_equal(projected.numpy(), cast.astype(np.float32))
    np.testing.assert_array_equal(fmt.encode(projected).numpy(), cast.view(np.uint8))


def test_bf16_equals_torch_for_all_high_halves_and_ties():
    high = torch.arange(0, 1 << 16, dtype=torch.int64)
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        bits = (high << 16 | low).to(torch.int32)
        x = bits.view(torch.float32)
        x = x[x.isfinite() & (x.abs() <= BF16.max)]
        expected = x.bfloat16()
        projected = BF16.project(x)
        assert torch.equal(projected, expected.float())
        assert torch.equal(BF16.encode(projected).to(torch.int16), expected.view(torch.int16))


def test_e8m0_is_powers_of_two_down_to_its_lowest_code():
    assert E8M0.values().tolist() == [2.0**e for e in range(-127, 128)]
    assert E8M0.encode(f32(2.0**-127, 2.0**-126, 1.0, 2.0**127, math.nan)).tolist() == [0, 1, 127, 254, 255]
    assert E8M0.project(f32(0.0, -3.0, 2.9, 3.1)).tolist() == [2.0**-127, 2.0**-127, 2.0, 4.0]


@given(st.sampled_from(ALL), floats)
def test_projection_is_on_the_grid_and_nearest(fmt, x):
    q, grid = fmt.project(f32(x)).item(), fmt.values().tolist()
    target = min(max(x, fmt.min), fmt.max)
    assert q in grid
    if getattr(fmt, "only_zero_is_zero", False) and target != 0:
        grid.remove(0.0)
    if len(grid) < 1000:
        assert q in [float(g) for g in nearest(target, grid)]


@given(st.sampled_from(ALL), st.floats(-500, 500, width=32), st.floats(0, 1 - 2**-24, width=32))
def test_stochastic_rounding_takes_a_neighbour_by_its_share(fmt, x, u):
    grid = fmt.values().tolist()
    target = min(max(x, fmt.min), fmt.max)
    lower = max(g for g in grid if g <= target)
    upper = min(g for g in grid if g >= target)
    got = fmt.project(f32(x), f32(u)).item()
    assert got in (lower, upper)
    if target != 0 and 0 in (lower, upper) and getattr(fmt, "only_zero_is_zero", False):
        assert got != 0
    elif lower < upper and isinstance(fmt, IntFormat | FloatFormat):
        # On magnitudes for floats: away from zero with the share's probability.
        if isinstance(fmt, FloatFormat) and target < 0:
            lower, upper = upper, lower
        share = (target - lower) / (upper - lower)
        assert got == (upper if u < np.float32(share) else lower)


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_every_code_round_trips(fmt):
    codes = torch.arange(1 << fmt.bits, dtype=torch.int64).to(fmt.code_dtype)
    values = fmt.decode(codes)
    expected = torch.tensor(fmt.code_values, dtype=torch.float32)
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
    finite = values.isfinite()
    assert torch.equal(fmt.decode(fmt.encode(values[finite])), values[finite])
    assert torch.equal(fmt.project(values[finite]), values[finite])
    assert values[finite].unique().numel() == fmt.values().numel()


def test_nan_is_never_hidden_and_infinity_saturates():
    for fmt in ALL:
        assert fmt.project(f32(math.nan)).isnan().all(), fmt.name
        assert fmt.project(f32(math.inf)).item() == fmt.max
        assert math.isnan(fmt.decode(fmt.encode(f32(math.nan))).item()) == fmt.has_nan


def test_no_underflow_rounds_to_zero_nothing_but_zero():
    x = f32(0.0, 1e-30, -1e-30, 2**-9, 0.3, 500.0)
    assert E4M3_NO_UNDERFLOW.project(x).tolist() == [0.0, 2**-9, -(2**-9), *E4M3.project(x[3:]).tolist()]
    assert E4M3_NO_UNDERFLOW.code_values[:127] == E4M3.code_values[:127]


def test_integer_grids():
    assert (INT8.min, INT8.max, INT4.min, INT4.max) == (-128, 127, -8, 7)
    assert TERNARY.values().tolist() == [-1, 0, 1]
    assert IntFormat("int8_narrow", 8, lowest=False).min == -127
    assert UINT8_NO_ZERO.values().tolist() == list(range(1, 256))
    assert INT4.encode(f32(-8, -1, 0, 7)).tolist() == [8, 15, 0, 7]


def test_codebook_ties_go_to_the_even_index():
    book = Codebook("thirds", (0.0, 1.0, 2.0, 4.0))
    assert book.project(f32(0.5, 1.5, 3.0, 2.9, 3.1, -7.0, 9.0)).tolist() == [0.0, 2.0, 2.0, 2.0, 4.0, 0.0, 4.0]
    assert NF4.encode(f32(0.0)).item() == 7


@pytest.mark.parametrize("broken", [
    lambda: IntFormat("int9", 9), lambda: IntFormat("int0", 0), lambda: IntFormat("int1", 1),
    lambda: IntFormat("uint1", 1, signed=False, lowest=False), lambda: FloatFormat("e9m0", 9, 0, 1),
    lambda: FloatFormat("lost", 2, 1, 1, top_codes_lost=8), lambda: Codebook("unsorted", (0.0, 2.0, 1.0)),
    lambda: Codebook("one", (1.0,)), lambda: Codebook("negative", (-2.0, -1.0)),
])  # fmt: skip
def test_impossible_formats_are_refused(broken):
    with pytest.raises(FormatError):
        broken()
