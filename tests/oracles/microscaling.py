# SPDX-License-Identifier: Apache-2.0
"""OCP Microscaling (MX v1.0, section 6.3) and its other scale rules, one block at a time, with exact comparisons."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from tests.oracles.number_formats import float_grid
from tests.oracles.nvfp4 import nearest_code

# exponent bits, mantissa bits, bias, largest number
ELEMENTS = {
    "e2m1": (2, 1, 1, 6.0),
    "e2m3": (2, 3, 1, 7.5),
    "e3m2": (3, 2, 3, 28.0),
    "e4m3": (4, 3, 7, 448.0),
    "e5m2": (5, 2, 15, 57344.0),
}
GRIDS = {name: np.array([float(v) for v in float_grid(*parts)]) for name, parts in ELEMENTS.items()}


def exponent(amax: float, element: str, rule: str) -> int:
    """The shared exponent n of X = 2^n, between -127 and 127.

    floor: floor(log2 amax) - floor(log2 max)                      (the OCP document)
    ceil:  ceil(log2 amax) - floor(log2 max)
    even:  floor(log2 of amax rounded to the element's mantissa bits, ties up) - floor(log2 max)
    up:    ceil(log2(amax / max)), the smallest n with amax <= max 2^n     (arXiv:2506.08027; RCEIL), of the quotient in
           float32, which changes n among float32's subnormals alone
    """
    if amax == 0:
        return -127
    _, mantissa_bits, _, largest = ELEMENTS[element]
    floor = math.frexp(amax)[1] - 1
    top = math.frexp(largest)[1] - 1
    if rule == "up":
        quotient = float(np.float32(amax / largest))
        n = floor - top - 1
        while Fraction(quotient) > Fraction(2) ** n:
            n += 1
    elif rule == "ceil":
        n = floor + (amax != 2.0**floor) - top
    elif rule == "even":
        n = floor + (Fraction(amax) >= (2 - Fraction(1, 2 ** (mantissa_bits + 1))) * Fraction(2) ** floor) - top
    else:
        n = floor - top
    return min(max(n, -127), 127)


def quantize(x: np.ndarray, element: str, rule: str, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Values on the element's grid, x's shape, and the E8M0 bytes, one for `size` elements of a row."""
    grid = GRIDS[element]
    values = np.zeros(x.shape)
    scales = np.zeros((x.shape[0], -(-x.shape[1] // size)), np.uint8)
    for r in range(x.shape[0]):
        for b in range(scales.shape[1]):
            part = slice(b * size, (b + 1) * size)
            block = x[r, part].astype(np.float64)
            n = exponent(float(np.abs(block).max()), element, rule)
            scales[r, b] = n + 127
            values[r, part] = nearest(block / 2.0**n, grid)  # exact in float64
    return values, scales


def nearest(y: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The number of the grid nearest to |y|, ties to the even code, saturating, with y's sign."""
    return np.copysign(grid[nearest_code(y, grid)], y)


def decoded(values: np.ndarray, scales: np.ndarray, size: int = 32) -> np.ndarray:
    """values * 2^(byte - 127), float64."""
    spread = np.exp2(scales.astype(np.float64) - 127).repeat(size, 1)[:, : values.shape[1]]
    return values * spread
