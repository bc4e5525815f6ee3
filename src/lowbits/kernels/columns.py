# SPDX-License-Identifier: Apache-2.0
"""Rotated groups of 16 whose elements lie far apart in memory, as Triton sees them: gradients and activations along
the tokens.

What `lowbits.kernels.blocks` does, with the same bits, in half the instructions: a thread holds the 16 elements of a
group in 16 registers, so that the rotation is 64 additions and a group's amax 16 comparisons, and nothing moves between
threads. A tile is [BG, BR]: groups along the contraction of BR rows, which are neighbours in memory.
"""

# Triton reads this file's source: annotations would be evaluated as its own types.

import triton
import triton.language as tl

from lowbits.kernels.blocks import _encoded, _magnitude_bits, _nearest_code, _rounded, _scaled, _scales


@triton.jit
def _group(x, group, row, R, K, stride_r, stride_k):
    """The 16 elements of each group, each [BG, BR]."""
    elements = ()
    for i in tl.static_range(16):
        k = group * 16 + i
        at = k[:, None].to(tl.int64) * stride_k + row[None, :].to(tl.int64) * stride_r
        elements = elements + (tl.load(x + at, (k[:, None] < K) & (row[None, :] < R), 0.0).to(tl.float32),)
    return elements


@triton.jit
def _rotated(elements, SIGNS: tl.constexpr):
    """`Hadamard.forward` but for its factor; bit i of SIGNS is a minus."""
    v = ()
    for i in tl.static_range(16):
        if (SIGNS >> i) & 1:
            v = v + (-elements[i],)
        else:
            v = v + (elements[i],)
    for level in tl.static_range(4):
        u = ()
        for i in tl.static_range(16):
            if (i >> level) & 1:
                u = u + (v[i - (1 << level)] - v[i],)
            else:
                u = u + (v[i] + v[i + (1 << level)],)
        v = u
    return v


@triton.jit
def _largest(v):
    """The bits of the largest magnitude of each group; NaN is the largest."""
    largest = _magnitude_bits(v[0])
    for i in tl.static_range(1, 16):
        largest = tl.maximum(largest, _magnitude_bits(v[i]))
    return largest


@triton.jit
def _joined(parts, COUNT: tl.constexpr, BG: tl.constexpr, BR: tl.constexpr):
    """COUNT tensors [BG, BR] as [BR, BG * COUNT], those of a group side by side."""
    w = parts
    for _ in tl.static_range(4):
        if len(w) > 1:
            u = ()
            for i in tl.static_range(len(w) // 2):
                u = u + (tl.join(w[i], w[i + len(w) // 2]),)
            w = u
    return tl.permute(w[0].reshape(BG, BR, COUNT), (1, 0, 2)).reshape(BR, BG * COUNT)


@triton.jit
def amax(
    x, result, R, K, stride_r, stride_k, SIGNS: tl.constexpr, SCALE: tl.constexpr, BF16: tl.constexpr,
    BG: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """The bits of the largest magnitude of the rotated x into `result`, which was 0."""
    # Backwards: what was written last, and what the quantizer reads first, is still in the cache.
    down, across = tl.num_programs(0) - 1 - tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    row, group = down * BR + tl.arange(0, BR), across * BG + tl.arange(0, BG)
    largest = tl.max(tl.max(_largest(_rotated(_group(x, group, row, R, K, stride_r, stride_k), SIGNS)), 1), 0)
    # Rounding keeps the order: the largest is rounded alone.
    largest = _scaled(largest.to(tl.float32, bitcast=True), SCALE, BF16)
    tl.atomic_max(result, largest.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def _words(noise, role, row, group, groups):
    """The four words of the counter that serves a group."""
    step = tl.load(noise)
    key = tl.load(noise + role).to(tl.uint64) | (tl.load(noise + role + 1).to(tl.uint64) << 32)
    counter = row[None, :].to(tl.int64) * groups + group[:, None]
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    step_low, step_high = tl.zeros_like(low) + step.to(tl.uint32), tl.zeros_like(low) + (step >> 32).to(tl.uint32)
    return tl.philox(key, low, high, step_low, step_high)


@triton.jit
def quantize(
    x, noise, whole, inner, codes, scales, outer, role, R, K, KP, stride_r, stride_k, SIGNS: tl.constexpr,
    SCALE: tl.constexpr, BF16: tl.constexpr, M: tl.constexpr, LOWEST: tl.constexpr, MAX: tl.constexpr,
    TOP: tl.constexpr, INVERSE: tl.constexpr, BITS: tl.constexpr, NAN: tl.constexpr, RULE: tl.constexpr,
    ROUNDING: tl.constexpr, INNER: tl.constexpr, CODES: tl.constexpr, BG: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """See `lowbits.kernels.blocks.quantize`; KP is a multiple of 16, codes have 4 bits."""
    row, group = tl.program_id(0) * BR + tl.arange(0, BR), tl.program_id(1) * BG + tl.arange(0, BG)
    groups = KP // 16
    known = (row[:, None] < R) & (group[None, :] < groups)
    rotated = _rotated(_group(x, group, row, R, K, stride_r, stride_k), SIGNS)
    v = ()
    for i in tl.static_range(16):
        v = v + (_scaled(rotated[i], SCALE, BF16),)
    whole_amax = tl.load(whole).to(tl.float32, bitcast=True)
    scale, encode, decode = _scales(_largest(v).to(tl.float32, bitcast=True), whole_amax, MAX, TOP, INVERSE, RULE)
    if ROUNDING != "NEAREST":
        words = _words(noise, role, row, group, groups)
    factor = scale
    if RULE == "TWO_LEVEL_POW2":
        factor = scale * decode
    decoded, code = (), ()
    for i in tl.static_range(16):
        u = v[i]
        if ROUNDING != "NEAREST":
            u = (words[i // 4] >> (8 * (i % 4))) & 255
        if CODES and ROUNDING == "NEAREST":
            code = code + (_nearest_code(v[i] * encode, M, LOWEST, MAX, BITS, NAN),)
        else:
            value = _rounded(v[i] * encode, u, M, LOWEST, MAX, ROUNDING)
            decoded = decoded + ((value * factor).to(inner.dtype.element_ty),)
            code = code + (_encoded(value, M, LOWEST, BITS, NAN),)
    if INNER:
        column = tl.program_id(1) * BG * 16 + tl.arange(0, BG * 16)
        tl.store(inner + row[:, None].to(tl.int64) * KP + column[None, :], _joined(decoded, 16, BG, BR),
                 (row[:, None] < R) & (column[None, :] < KP))  # fmt: skip
    if RULE == "TWO_LEVEL" or RULE == "TWO_LEVEL_POW2" or RULE == "TWO_LEVEL_UP":
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(outer, decode)
    if CODES:
        pairs = ()
        for i in tl.static_range(16 // 2):
            pairs = pairs + ((code[2 * i] | (code[2 * i + 1] << 4)).to(tl.uint8),)
        byte = tl.program_id(1) * BG * (16 // 2) + tl.arange(0, BG * (16 // 2))
        tl.store(codes + row[:, None].to(tl.int64) * (KP // 2) + byte[None, :], _joined(pairs, 16 // 2, BG, BR),
                 (row[:, None] < R) & (byte[None, :] < KP // 2))  # fmt: skip
        at = scales + row[:, None].to(tl.int64) * groups + group[None, :]
        tl.store(at, tl.permute(_encoded(scale, 3, -6, 8, 127).to(tl.uint8), (1, 0)), known)
