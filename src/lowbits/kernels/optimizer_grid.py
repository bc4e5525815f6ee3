# SPDX-License-Identifier: Apache-2.0
"""Parameters of codes, as Triton sees them: read, moved by an update, rounded stochastically, written.

The eager definition is `lowbits.nn.moved`; codes are equal to its codes bit for bit. Tiles are [NB, BLOCK], of blocks
of SIZE elements; one, two or four codes lie in a byte (GRID), rows end with a byte.
"""

# Triton reads this file's source: annotations would be evaluated as its own types.

import triton
import triton.language as tl

LARGEST_CHANGE = tl.constexpr(256.0)  # in codes, see `lowbits.nn`


@triton.jit
def _bytes(left, SIZE: tl.constexpr, BLOCK: tl.constexpr, NB: tl.constexpr, GRID: tl.constexpr):
    """Where the bytes of a tile lie behind its first, and which exist."""
    lane = tl.arange(0, BLOCK // GRID)[None, :]
    at = tl.arange(0, NB)[:, None] * (SIZE // GRID) + lane
    return at, (at * GRID < left) & (lane < SIZE // GRID)


@triton.jit
def fetch(
    target, base, inner, mask, left, SIZE: tl.constexpr, BLOCK: tl.constexpr, NB: tl.constexpr, GRID: tl.constexpr
):
    """The bytes of a tile; elements that do not exist are 0."""
    if GRID == 1:
        stored = tl.load(target + base + inner, mask, 0)
    else:
        at, there = _bytes(left, SIZE, BLOCK, NB, GRID)
        stored = tl.load(target + base // GRID + at, there, 0)
    return stored


@triton.jit
def decode(stored, GRID: tl.constexpr):
    """Codes, int32 [NB, BLOCK]."""
    if GRID == 1:
        code = stored.to(tl.int32)
    elif GRID == 2:
        code = (tl.interleave(stored & 15, stored >> 4).to(tl.int32) ^ 8) - 8
    else:
        tl.static_assert(GRID == 4)
        even = tl.interleave(stored & 3, (stored >> 4) & 3)
        odd = tl.interleave((stored >> 2) & 3, stored >> 6)
        code = (tl.interleave(even, odd).to(tl.int32) ^ 2) - 2
    return code


@triton.jit
def steps(unit, element, channel, mask, CHANNELS: tl.constexpr):
    """The step of the tensor, or that of each element."""
    if CHANNELS:
        return tl.load(unit + element // channel, mask, 1.0)
    else:
        return tl.load(unit)


@triton.jit
def uniform(key, start, t, SIZE: tl.constexpr, NB: tl.constexpr, BLOCK: tl.constexpr):
    """Float32 k / 2^24 for each element, as `Noise.uniform`: a counter serves 4 elements."""
    counter = (start >> 2) + tl.arange(0, NB)[:, None] * (SIZE // 4) + tl.arange(0, BLOCK // 4)[None, :]
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    step = tl.zeros_like(low) + t.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, low, high, step, tl.zeros_like(low))
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return (words >> 8).to(tl.int32).to(tl.float32) * (2.0**-24)


@triton.jit
def moved(code, change, step, draw, STOCHASTIC: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Codes after an update, int32: clamp(q + SR(change / D)); see `lowbits.nn.moved`."""
    d = change * tl.div_rn(1.0, step)
    finite = tl.abs(d) < float("inf")
    d = tl.where(finite, tl.minimum(tl.maximum(d, -LARGEST_CHANGE), LARGEST_CHANGE), 0.0)
    if STOCHASTIC:
        below = tl.floor(d)
        whole = below.to(tl.int32) + tl.where(draw < d - below, 1, 0)
    else:
        # Adding 1.5 * 2^23 rounds to an integer, halves to even.
        whole = ((d + 12582912.0) - 12582912.0).to(tl.int32)
    return tl.minimum(tl.maximum(code + whole, LOW), HIGH)


@triton.jit
def store(
    code, target, base, inner, mask, left, SIZE: tl.constexpr, BLOCK: tl.constexpr, NB: tl.constexpr,
    GRID: tl.constexpr
):  # fmt: skip
    """Write the codes of a tile."""
    if GRID == 1:
        tl.store(target + base + inner, code.to(tl.int8), mask)
    else:
        at, there = _bytes(left, SIZE, BLOCK, NB, GRID)
        code = tl.where(mask, code, 0)
        if GRID == 2:
            low, high = tl.split((code & 15).reshape(NB, BLOCK // 2, 2))
            stored = low | (high << 4)
        else:
            even, odd = tl.split((code & 3).reshape(NB, BLOCK // 4, 2, 2))
            first, third = tl.split(even)
            second, fourth = tl.split(odd)
            stored = first | (second << 2) | (third << 4) | (fourth << 6)
        tl.store(target + base // GRID + at, stored.to(tl.uint8), there)
