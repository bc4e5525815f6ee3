# SPDX-License-Identifier: Apache-2.0
"""The quotient that `lowbits.kernels.rows` takes on a GPU is the correctly rounded one.

Triton's interpreter has no fused multiply-add, so the formula is followed here step by step, fused by 64-bit mantissas;
`python -m tests.kernels.rows` compares the kernel itself where there is a GPU.
"""

from __future__ import annotations

import numpy as np
import pytest


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32(a b + c): the product of two float32 numbers is exact in 48 bits."""
    wide = np.longdouble
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(np.float32)


def quotient(v: np.ndarray, divisor: np.ndarray, corrections: int) -> np.ndarray:
    reciprocal = (np.float32(1) / divisor).astype(np.float32)
    q = v * reciprocal
    for _ in range(corrections):
        q = fused(fused(-q, divisor, v), reciprocal, q)
    return q


@pytest.mark.parametrize("seed", range(2))
def test_two_corrections_leave_the_nearest_number(seed: int) -> None:
    """Around ties between integers, where a code hangs on the last bit; divisors close to 2 are the worst."""
    assert np.finfo(np.longdouble).nmant >= 63, "needs 64-bit mantissas"
    generator = np.random.default_rng(seed)
    n = 500_000
    anywhere = generator.uniform(1, 2, n).astype(np.float32)
    near_two = np.float32(2) - generator.integers(1, 200, n).astype(np.float32) * np.float32(2**-23)
    divisor = np.where(generator.random(n) < 0.5, np.minimum(anywhere, np.float32(2 - 2**-23)), near_two)
    ties = (divisor.astype(np.float64) * (generator.integers(0, 127, n) + 0.5)).astype(np.float32)
    v = (ties.view(np.int32) + generator.integers(-2, 3, n).astype(np.int32)).view(np.float32)
    right = v / divisor
    assert (quotient(v, divisor, 2) == right).all()
    assert (quotient(v, divisor, 0) != right).any()  # the reciprocal alone does not


def test_what_underflows_keeps_its_sign_by_that_of_the_dividend():
    """The corrections alone turn -0 into 0, which FP8 has a code for; integers have not."""
    v, divisor = np.array([-0.0, -1e-12 * 2.0**-119], np.float32), np.array([1.5, 1.5], np.float32)
    bare = quotient(v, divisor, 2)
    signed = (bare.view(np.uint32) | (v.view(np.uint32) & np.uint32(0x80000000))).view(np.float32)
    assert not np.signbit(bare).any()
    assert np.array_equal(signed.view(np.uint32), (v / divisor).view(np.uint32))
