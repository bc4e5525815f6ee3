# SPDX-License-Identifier: Apache-2.0
"""GETA (arXiv:2502.16638) in plain Python, one number at a time; written from the paper, imports nothing of ours."""

from __future__ import annotations

import math
from collections.abc import Sequence


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


def half_to_even(x: float) -> int:
    return round(x)  # Python rounds halves to even


def mapped(x: float, q: float, t: float) -> float:
    """c(x)."""
    return abs(x) ** t if abs(x) < q else q**t


def quantized(x: float, d: float, q: float, t: float) -> float:
    return sign(x) * d * half_to_even(mapped(x, q, t) / d)


def residual(x: float, d: float, q: float, t: float) -> float:
    """R(x)."""
    c = mapped(x, q, t)
    return half_to_even(c / d) - c / d


def gradients(x: Sequence[float], g: Sequence[float], d: float, q: float, t: float) -> tuple[list[float], list[float]]:
    """Return the gradient of every x, and those of d, q, t."""
    each, scalars = [], [0.0, 0.0, 0.0]
    for value, upstream in zip(x, g, strict=True):
        inside = abs(value) < q
        each.append(upstream if inside else 0.0)
        scalars[0] += upstream * sign(value) * residual(value, d, q, t)
        if not inside:
            scalars[1] += upstream * sign(value) * t * q ** (t - 1)
            scalars[2] += upstream * sign(value) * q**t * math.log(q)
        elif value:
            scalars[2] += upstream * sign(value) * abs(value) ** t * math.log(abs(value))
    return each, scalars


def bits(d: float, q: float, t: float) -> float:
    return math.log2(q**t / d + 1) + 1


def step(b: float, q: float, t: float) -> float:
    return q**t / (2 ** (b - 1) - 1)


ETA, XI, SHRINK = 0.999, 0.9, 0.8


def rule(
    a: float,
    beta: float,
    size: float,
    e: Sequence[float],
    finest: Sequence[float],
    coarsest: Sequence[float],
    uniform: float,
) -> tuple[float, list[float]]:
    """Return gamma and the step of every layer of one dimension; a > 0."""
    eta, xi, shrink = ETA, XI, SHRINK
    if size <= 1e-12:
        gamma = 0.0
    elif beta >= 0:
        gamma = uniform
    else:
        gamma = min((1 - eta) * a / -beta, uniform)
    against = [value < 0 and gamma > 0 for value in e]
    steps = [
        xi * eta * a / (gamma * -value * sum(against)) if hit else high
        for value, hit, high in zip(e, against, coarsest, strict=True)
    ]
    while any(hit and d < low * (1 - 1e-12) for hit, d, low in zip(against, steps, finest, strict=True)):
        gamma *= shrink
        steps = [d / shrink if hit else d for d, hit in zip(steps, against, strict=True)]
    return gamma, [min(d, high) for d, high in zip(steps, coarsest, strict=True)]


def saliency(x: Sequence[Sequence[float]], u: Sequence[Sequence[float]]) -> list[float]:
    """Return the score of every unit, given its weights and the direction of its update."""
    rows = []
    for own, direction in zip(x, u, strict=True):
        norm = math.sqrt(sum(v * v for v in own))
        dot = sum(v * w for v, w in zip(own, direction, strict=True))
        length = math.sqrt(sum(w * w for w in direction))
        cosine = dot / (norm * length) if norm * length else 0.0
        rows.append([norm, norm / len(own), cosine + 1, abs(dot), dot * dot / 2])
    norms = [math.sqrt(sum(row[i] ** 2 for row in rows)) for i in range(5)]
    return [sum(0.2 * row[i] / norms[i] for i in range(5) if norms[i]) for row in rows]


def lowest(
    scores: Sequence[float], live: Sequence[bool], sizes: Sequence[int], stays: Sequence[int], number: int
) -> list[int]:
    """Return the units that go: walk up the scores, skip those whose dimension is at its floor."""
    owner = [dimension for dimension, size in enumerate(sizes) for _ in range(size)]
    left = [0] * len(sizes)
    for unit, alive in enumerate(live):
        left[owner[unit]] += alive
    gone: list[int] = []
    for unit in sorted((unit for unit, alive in enumerate(live) if alive), key=lambda unit: scores[unit]):
        if len(gone) < number and left[owner[unit]] > stays[owner[unit]]:
            left[owner[unit]] -= 1
            gone.append(unit)
    return sorted(gone)
