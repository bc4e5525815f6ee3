# SPDX-License-Identifier: Apache-2.0
"""Direct quantized training and BitNet b1.58 in plain float64, one element after the other.

Written from arXiv:2412.04787 (sec. 3) and arXiv:2402.17764 (eq. 1 to 3); imports nothing of the library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Matrix = Sequence[Sequence[float]]


def half_even(x: float) -> int:
    """Round to the nearest integer, halves to the even one."""
    return round(x)


def clamp(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def absmean_top(weight: Sequence[float], high: int) -> float:
    """D = max(mean |W|, 1e-5) / Qp."""
    return max(sum(abs(w) for w in weight) / len(weight), 1e-5) / high


def start(weight: Sequence[float], step: float, low: int, high: int) -> list[int]:
    """q0 = clamp(round(W / D), Qn, Qp)."""
    return [int(clamp(half_even(w / step), low, high)) for w in weight]


def stochastic(x: float, u: float) -> int:
    """floor(x), or the integer above with the probability of what lies above floor(x)."""
    return math.floor(x) + (1 if u < x - math.floor(x) else 0)


def write_back(codes: Sequence[int], new: Sequence[float], step: float, low: int, high: int, u: Sequence[float]):
    """q <- SR(clamp(W' / D, Qn, Qp)), as published: the candidate is clamped, then rounded."""
    return [stochastic(clamp(w / step, low, high), draw) for w, draw in zip(new, u, strict=True)]


def adamw(  # noqa: PLR0913  the published arguments
    w: float, g: float, m: float, v: float, t: int, lr: float, betas: tuple[float, float], eps: float, decay: float
) -> tuple[float, float, float]:
    """Decoupled decay before the step, eps outside of the corrected root (torch's order)."""
    b1, b2 = betas
    w = w * (1 - lr * decay)
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    return w - lr * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + eps), m, v


def token(x: Sequence[float]) -> tuple[list[int], float]:
    """Codes of one token and sx = 127 / max(max |x|, 1e-5)."""
    sx = 127 / max(max(abs(v) for v in x), 1e-5)
    return [int(clamp(half_even(v * sx), -128, 127)) for v in x], sx


def linear(x: Matrix, codes: Sequence[Sequence[int]], step: float) -> list[list[float]]:
    """y = (x_int8 q^T) D / sx."""
    rows = []
    for row in x:
        quantized, sx = token(row)
        rows.append([sum(a * b for a, b in zip(quantized, q, strict=True)) * step / sx for q in codes])
    return rows


def bit_weight(weight: Sequence[float]) -> tuple[list[int], float]:
    """Ternary codes of BitNet b1.58 and g = max(mean |W|, 1e-5)."""
    g = max(sum(abs(w) for w in weight) / len(weight), 1e-5)
    return [int(clamp(half_even(w / g), -1, 1)) for w in weight], g
