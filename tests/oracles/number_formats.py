# SPDX-License-Identifier: Apache-2.0
"""Rounding to a finite grid with exact rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction


def float_grid(exponent_bits: int, mantissa_bits: int, bias: int, top: float) -> list[Fraction]:
    """Non-negative values of a float format up to `top` (taken from the format's specification), in code order."""
    grid = []
    for e in range(1 << exponent_bits):
        for f in range(1 << mantissa_bits):
            fraction = Fraction(f, 1 << mantissa_bits)
            value = fraction * Fraction(2) ** (1 - bias) if e == 0 else (1 + fraction) * Fraction(2) ** (e - bias)
            if value <= Fraction(top):
                grid.append(value)
    return grid


def nearest(x: float, grid: list[Fraction]) -> list[Fraction]:
    """All grid points nearest to x, one, or two if x is half way."""
    distance = [abs(Fraction(x) - g) for g in grid]
    best = min(distance)
    return [g for g, d in zip(grid, distance, strict=True) if d == best]


def round_float(x: float, grid: list[Fraction]) -> float:
    """Round |x| to the grid, ties to the even code, saturating; the sign is kept."""
    if math.isnan(x):
        return x
    magnitude = min(abs(x), float(grid[-1]))
    best = nearest(magnitude, grid)
    chosen = best[0] if len(best) == 1 or grid.index(best[0]) % 2 == 0 else best[1]
    return math.copysign(float(chosen), x)
