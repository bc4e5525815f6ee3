# SPDX-License-Identifier: Apache-2.0
"""FP8 with float32 scales, in numpy: one float32 operation at a time, rounding decided exactly."""

from __future__ import annotations

import numpy as np

from tests.oracles.microscaling import GRIDS, nearest
from tests.oracles.nvfp4 import Encoded, block_amax, f32


def blocks_of(kind: str, shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    rows, columns = shape
    return {"tensor": (rows, columns), "row": (1, columns), "1x128": (1, 128), "128x128": (128, 128)}[kind]


def power_below(x: np.ndarray) -> np.ndarray:
    """The largest power of two that is not above x > 0."""
    return f32(np.exp2(np.frexp(x)[1] - 1.0))


def by_reciprocal(x: np.ndarray, element: str, kind: str, floor: float, power_of_two: bool):
    """torchao's cast: s = max / clamp(amax, floor) in float64, rounded to float32; q = cast(clamp(x s)).

    Returns values and s, the ENCODE scale of every block.
    """
    largest = GRIDS[element][-1]
    block = blocks_of(kind, x.shape)
    amax = block_amax(f32(x), block).astype(np.float64)
    encode = f32(largest / np.maximum(amax, floor))
    if power_of_two:
        encode = power_below(encode)
    y = f32(x) * Encoded(x, encode, np.float32(1), block).of_elements()
    return nearest(y, GRIDS[element]), encode


def by_quotient(x: np.ndarray, element: str, kind: str, power_of_two: bool = False):
    """scale = amax / max, rounded to float32 (or the smallest power of two not below it); q = cast(x / scale).

    Returns values and the DECODE scale of every block; a block of zeros has scale 1.
    """
    largest = np.float32(GRIDS[element][-1])
    block = blocks_of(kind, x.shape)
    amax = block_amax(f32(x), block)
    scale = np.where(amax == 0, np.float32(1), amax / largest)
    if power_of_two:
        below = power_below(scale)
        scale = np.where(below == scale, scale, 2 * below)
    y = f32(x) / Encoded(x, scale, np.float32(1), block).of_elements()
    return nearest(y, GRIDS[element]), scale
