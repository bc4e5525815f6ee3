# SPDX-License-Identifier: Apache-2.0
"""GETA's quantizer in one pass over a tensor, and all its gradients in one pass over the tensor and its gradient.

The eager definition is `lowbits.methods.geta.quantize`. A program works on BLOCK consecutive elements; the sums over
the tensor are left as one row a program, to be added up in a fixed order. Needs triton; imported where it is used.

    x, out, g, grad_x     [size], contiguous, any float of 32 bits or fewer
    step, limit, exponent float32, one element each
    partial               float32 [programs, 3]
"""

# Triton reads this file's source: annotations would be evaluated as its own types.

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = triton.knobs.runtime.interpret
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _power(x, t):
    """x^t for x >= 0, as torch computes it on CUDA; the interpreter has no such function."""
    if _INTERPRETED:
        return tl.where((x == 0.0) | (t == 1.0), x, tl.exp2(t * tl.log2(tl.where(x == 0.0, 1.0, x))))
    else:
        return libdevice.pow(x, t)


@triton.jit
def _whole(x):
    """Round half to even."""
    if _INTERPRETED:
        near = tl.floor(x + 0.5)
        return tl.where((near - x == 0.5) & (near * 0.5 != tl.floor(near * 0.5)), near - 1.0, near)
    else:
        return libdevice.rint(x)


@triton.jit
def _mapped(x, limit, exponent):
    """Sign, min(|x|, q_m) and c; of a NaN all but the sign are NaN."""
    sign = tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))
    size = tl.abs(x)
    clipped = tl.where(size >= limit, limit, size)
    return sign, clipped, _power(clipped, exponent + 0.0 * clipped)


@triton.jit
def quantize(x, step, limit, exponent, out, size, BLOCK: tl.constexpr):
    """out = sgn(x) d round(c / d)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    d, q, t = tl.load(step), tl.load(limit), tl.load(exponent)
    sign, _, c = _mapped(tl.load(x + at, live, 0.0).to(tl.float32), q, t)
    y = sign * (_whole(tl.div_rn(c, d + 0.0 * c)) * d)
    tl.store(out + at, y.to(out.dtype.element_ty), live)


@triton.jit
def gradients(
    x, g, step, limit, exponent, grad_x, partial, size, share, MAPPED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """grad_x, and the sums of a block times `share`, in the order step, limit, exponent."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    d, q, t = tl.load(step), tl.load(limit), tl.load(exponent)
    value = tl.load(x + at, live, 0.0).to(tl.float32)
    up = tl.load(g + at, live, 0.0).to(tl.float32)
    sign, clipped, c = _mapped(value, q, t)
    signed = up * sign
    inside = tl.abs(value) < q
    codes = tl.div_rn(c, d + 0.0 * c)
    safe = tl.where(clipped == 0.0, 1.0, clipped)
    logarithm = tl.log(safe) if _INTERPRETED else libdevice.log(safe)
    slope = t * tl.sum(_power(q + tl.zeros([1], tl.float32), t - 1.0 + tl.zeros([1], tl.float32)))
    row = partial + tl.program_id(0).to(tl.int64) * 3
    tl.store(row, tl.sum(signed * (_whole(codes) - codes)) * share)
    tl.store(row + 1, tl.sum(tl.where(inside, 0.0, signed)) * slope * share)
    tl.store(row + 2, tl.sum(signed * (c * logarithm)) * share)
    down = tl.where(inside, up, 0.0)
    if MAPPED:
        down = tl.where(inside & (clipped > 0.0), down * (t * _power(safe, t - 1.0 + 0.0 * safe)), down)
    tl.store(grad_x + at, down.to(grad_x.dtype.element_ty), live)
