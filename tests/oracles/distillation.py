# SPDX-License-Identifier: Apache-2.0
"""Quantized distillation and differentiable quantization (Polino et al. 2018, arXiv:1802.05668), one number at a time.

Float64 and plain lists throughout, written from the paper; nothing of the library is used.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence


def buckets(values: Sequence[float], size: int) -> list[list[float]]:
    """Cut a flattened tensor into buckets; the last one is as short as it is."""
    return [list(values[i : i + size]) for i in range(0, len(values), size)]


def scale(bucket: Sequence[float]) -> list[float]:
    """sc(v) = (v - beta) / alpha, beta = min, alpha = max - min; a constant bucket is all zeros."""
    low, high = min(bucket), max(bucket)
    return [(v - low) / (high - low) if high > low else 0.0 for v in bucket]


def half_even(x: float) -> int:
    """Round to the nearest integer, ties to even."""
    below = math.floor(x)
    if x - below == 0.5:
        return below if below % 2 == 0 else below + 1
    return math.floor(x + 0.5)


def uniform_codes(bucket: Sequence[float], levels: int) -> list[int]:
    """l = round(sc(v) (s - 1)), of s levels."""
    return [half_even(v * (levels - 1)) for v in scale(bucket)]


def stochastic_codes(bucket: Sequence[float], levels: int, uniform: Sequence[float]) -> list[int]:
    """floor(t) + Bernoulli(t - floor(t)), t = sc(v) (s - 1), with the given uniform numbers."""
    targets = [v * (levels - 1) for v in scale(bucket)]
    return [math.floor(t) + (u < t - math.floor(t)) for t, u in zip(targets, uniform, strict=True)]


def rebuild(codes: Sequence[int], points: Sequence[float], bucket: Sequence[float]) -> list[float]:
    """Q(v) = alpha p[code] + beta with the alpha and beta of the bucket that was coded."""
    low, high = min(bucket), max(bucket)
    return [(high - low) * points[code] + low for code in codes]


def uniform_points(levels: int) -> list[float]:
    """0, 1/n, ..., 1 with n = s - 1."""
    return [i / (levels - 1) for i in range(levels)]


def nearest(v: float, points: Sequence[float]) -> int:
    """The index of the nearest point, the lowest index of the smallest point among equals."""
    best = min(abs(v - p) for p in points)
    return min((p, i) for i, p in enumerate(points) if abs(v - p) == best)[1]


def point_gradients(
    values: Sequence[float], gradients: Sequence[float], points: Sequence[float], size: int
) -> list[float]:
    """dL/dp_j = sum over v assigned to j of dL/dQ(v) alpha of v's bucket."""
    total = [0.0] * len(points)
    for bucket, grads in zip(buckets(values, size), buckets(gradients, size), strict=True):
        alpha = max(bucket) - min(bucket)
        for v, g in zip(scale(bucket), grads, strict=True):
            total[nearest(v, points)] += g * alpha
    return total


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile with linear interpolation between order statistics."""
    ordered = sorted(values)
    where = q * (len(ordered) - 1)
    below = min(math.floor(where), len(ordered) - 2) if len(ordered) > 1 else 0
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (where - below) * (ordered[above] - ordered[below])


def redistribute(counts: Sequence[int], norms: Sequence[float]) -> list[int]:
    """Keep floor(n / 2) points each, share the rest in proportion to the norms, by largest remainder."""
    kept = [n // 2 for n in counts]
    free = sum(counts) - sum(kept)
    exact = [free * g / sum(norms) for g in norms]
    given = [math.floor(e) for e in exact]
    order = sorted(range(len(counts)), key=lambda i: -(exact[i] - given[i]))
    for i in order[: free - sum(given)]:
        given[i] += 1
    return [k + g for k, g in zip(kept, given, strict=True)]


def softmax(logits: Sequence[float], temperature: float) -> list[float]:
    """exp(z / T) / sum exp(z / T)."""
    top = max(logits)
    e = [math.exp((z - top) / temperature) for z in logits]
    return [x / sum(e) for x in e]


def loss(
    student: Sequence[Sequence[float]],
    teacher: Sequence[Sequence[float]],
    labels: Sequence[int],
    temperature: float,
    weight: float,
) -> float:
    """w T^2 KL(teacher || student) + (1 - w) CE, each summed over classes and averaged over the batch."""
    total = 0.0
    for z, t, y in zip(student, teacher, labels, strict=True):
        p, q = softmax(t, temperature), softmax(z, temperature)
        kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
        total += weight * temperature**2 * kl - (1 - weight) * math.log(softmax(z, 1.0)[y])
    return total / len(labels)


def huffman_bits(counts: Sequence[int]) -> int:
    """Bits of the whole message under an optimal prefix code: the sum of all merged weights; one symbol takes 1 bit."""
    heap = [c for c in counts if c]
    if len(heap) == 1:
        return heap[0]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return total


def entropy(counts: Sequence[int]) -> float:
    """-sum p log2 p."""
    total = sum(counts)
    return -sum(c / total * math.log2(c / total) for c in counts if c)
