# SPDX-License-Identifier: Apache-2.0
"""The linear quantizer and AdamW of Chitsaz et al. 2024 (arXiv:2407.11722), one number at a time.

Float64 throughout; `f32` rounds once after each operation. A float64 operation on float32 operands, rounded to float32,
is the float32 operation (53 >= 2 * 24 + 2), so these are the exact bits that float32 arithmetic must give.
"""

from __future__ import annotations

import numpy as np


def f32(x: float) -> float:
    """Round to float32."""
    return float(np.float32(x))


def half_even(x: float) -> float:
    """Round to the nearest integer, ties to even."""
    return float(np.rint(np.float64(x)))


def symmetric(group: list[float], low: int, high: int, floor: float = 0.0) -> tuple[list[float], float]:
    """Codes and scale of one group: s = max(amax, floor) / Qp, or 1 for zeros; q = round(clamp(x / s))."""
    amax = max(max(abs(v) for v in group), floor)
    scale = 1.0 if amax == 0 else max(f32(amax / high), 2.0**-126)
    return [half_even(min(max(f32(v / scale), low), high)) for v in group], scale


def asymmetric(group: list[float], low: int, high: int) -> tuple[list[float], float, float]:
    """Codes, scale and zero point of one group whose range includes 0."""
    smallest, largest = min(*group, 0.0), max(*group, 0.0)
    spread = f32(largest - smallest)
    scale = 1.0 if spread == 0 else max(f32(spread / (high - low)), 2.0**-126)
    zero = half_even(f32(f32(smallest / scale) - low))
    return [half_even(min(max(f32(f32(v / scale) - zero), low), high)) for v in group], scale, zero


def asymmetric_study(group: list[float], low: int, high: int, floor: float) -> tuple[list[float], float, float]:
    """The published code's form: s = max(max - min, floor) / (2 Qp), z = round(min / s - Qn)."""
    scale = max(f32(max(f32(max(group) - min(group)), f32(floor)) / (2 * high)), 2.0**-126)
    zero = half_even(f32(f32(min(group) / scale) - low))
    return [half_even(min(max(f32(f32(v / scale) - zero), low), high)) for v in group], scale, zero


def groups(shape: tuple[int, int], kind: str, size: tuple[int, int] = (1, 1)) -> list[list[tuple[int, int]]]:
    """The index sets that share a scale, for a [rows, columns] tensor."""
    rows, columns = shape
    cells = [(r, c) for r in range(rows) for c in range(columns)]
    key = {
        "tensor": lambda r, c: 0,
        "row": lambda r, c: r,
        "column": lambda r, c: c,
        "group": lambda r, c: (r, c // size[1]),
        "block": lambda r, c: (r * columns + c) // size[1],
        "tile": lambda r, c: (r // size[0], c // size[1]),
    }[kind]
    found: dict[object, list[tuple[int, int]]] = {}
    for r, c in cells:
        found.setdefault(key(r, c), []).append((r, c))
    return list(found.values())


def fake_quantize(x: np.ndarray, kind: str, bits: int, size: tuple[int, int] = (1, 1)) -> np.ndarray:
    """Quantize and decode a matrix in float64 (scale and quotient not rounded to float32)."""
    high = 2 ** (bits - 1) - 1
    out = np.zeros_like(x, dtype=np.float64)
    for cells in groups(x.shape, kind, size):
        amax = max(abs(float(x[c])) for c in cells)
        scale = amax / high if amax > 0 else 1.0
        for c in cells:
            out[c] = half_even(min(max(float(x[c]) / scale, -high - 1), high)) * scale
    return out


def adamw(p, g, m, v, t, lr, betas, eps, decay):  # noqa: PLR0913  the symbols of the paper
    """One AdamW step in float64, spec order: decay, moments, update."""
    b1, b2 = betas
    p = p * (1 - lr * decay)
    m = m + (1 - b1) * (g - m)
    v = b2 * v + (1 - b2) * g * g
    return p - lr / (1 - b1**t) * m / (np.sqrt(v) / np.sqrt(1 - b2**t) + eps), m, v
