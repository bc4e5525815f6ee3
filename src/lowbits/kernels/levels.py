# SPDX-License-Identifier: Apache-2.0
"""Round a weight to the levels of its buckets in one pass: read once, written once.

The eager definition is `lowbits.methods._levels`'s; results are equal to its bit for bit. Needs triton; imported where
it is used. Launch without fused multiply-adds (`enable_fp_fusion=False`): the definition rounds after every operation.

    w, out      rows of `length` elements, contiguous; a row is cut into `across` buckets of `size`, the last one may be
                shorter
    counter     int64 [3]: draw, two words of the key; for stochastic rounding alone
"""

# Triton reads this file's source: annotations would be evaluated as its own types.

import triton
import triton.language as tl

from lowbits.kernels.blocks import INTERPRETED, _as_bf16

_INTERPRETED = tl.constexpr(INTERPRETED)

_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, ties to even


@triton.jit
def _divide(x, y):
    """IEEE division; the interpreter's own is."""
    if _INTERPRETED:
        return x / y
    return tl.div_rn(x, y)


@triton.jit
def _uniform(counter, element):
    """k / 2^24 of every element: `Noise.uniform`."""
    draw, low, high = tl.load(counter), tl.load(counter + 1), tl.load(counter + 2)
    block = element >> 2
    first = (block & 0xFFFFFFFF).to(tl.uint32)
    zero = first * 0
    w0, w1, w2, w3 = tl.philox(
        low | (high << 32), first, (block >> 32).to(tl.uint32), zero + (draw & 0xFFFFFFFF).to(tl.uint32),
        zero + (draw >> 32).to(tl.uint32)
    )  # fmt: skip
    which = element & 3
    word = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
    return (word & 0xFFFFFF00).to(tl.float32) * 2.3283064365386963e-10


@triton.jit
def round_to_levels(
    w, counter, out, length, size, across, buckets, intervals, NOISE: tl.constexpr, S: tl.constexpr, NB: tl.constexpr
):
    """out = Q(w), NB buckets of at most S elements a program."""
    b = tl.program_id(0).to(tl.int64) * NB + tl.arange(0, NB)[:, None]
    begin = (b % across) * size
    column = tl.arange(0, S)[None, :]
    inside = (column < size) & (begin + column < length) & (b < buckets)
    at = (b // across) * length + begin + column
    x = tl.load(w + at, inside, 0.0).to(tl.float32)
    low = tl.min(tl.where(inside, x, float("inf")), 1)[:, None]
    high = tl.max(tl.where(inside, x, float("-inf")), 1)[:, None]
    bad = tl.max((inside & (x != x)).to(tl.int32), 1)[:, None] > 0
    low = tl.where(bad, float("nan"), low)  # one that is no number makes its bucket none
    extent = high - low
    flat = extent == 0
    target = tl.where(flat, 0.0, _divide(x - low, tl.where(flat, 1.0, extent))) * intervals
    if NOISE:
        below = tl.floor(target)
        level = below + (_uniform(counter, at) < target - below).to(tl.float32)
    else:
        level = (target + _MAGIC) - _MAGIC
    p = _divide(level, tl.zeros_like(level) + intervals)
    y = tl.where(p < 0.5, low + p * extent, high - (1.0 - p) * extent)
    if out.dtype.element_ty == tl.bfloat16:
        y = _as_bf16(y)
    tl.store(out + at, y.to(out.dtype.element_ty), inside)
