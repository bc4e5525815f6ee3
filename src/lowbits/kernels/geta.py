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


# --- slices of many parameters in one launch -------------------------------------------------------------------------
#
# A piece is the slices `rows` of one parameter along one axis, in row-major order. What is to be done lies in tables on
# the device, so the number of parameters costs no launches:
#
#     pieces   int64 [P, COLUMNS]  addresses and sizes, see the constants below
#     chunks   int64 [C, 2]        piece and first element: BLOCK elements for a program to work on
#     own      uint8 [n]           0 where an earlier piece has the element as well, along another axis

PARAMETER = tl.constexpr(0)  # address, float32
ROWS = tl.constexpr(1)  # address of int64 [COUNT]
COUNT = tl.constexpr(2)
SIZE = tl.constexpr(3)  # of the axis
INNER = tl.constexpr(4)  # elements behind one index of the axis
LENGTH = tl.constexpr(5)  # elements of the piece
BASE = tl.constexpr(6)  # elements of all pieces before
LAYER = tl.constexpr(7)  # number of the quantizer, -1 without
DIMENSION = tl.constexpr(8)
COLUMNS = tl.constexpr(9)


@triton.jit
def _places(pieces, chunks, BLOCK: tl.constexpr):
    """Piece, its row, places among all elements, places in its parameter, and which of them there are."""
    piece = tl.load(chunks + 2 * tl.program_id(0))
    row = pieces + piece * COLUMNS
    k = tl.load(chunks + 2 * tl.program_id(0) + 1) + tl.arange(0, BLOCK)
    live = k < tl.load(row + LENGTH)
    inner, count = tl.load(row + INNER), tl.load(row + COUNT)
    rows = tl.load(row + ROWS).to(tl.pointer_type(tl.int64))
    line = k // inner
    index = tl.load(rows + line % count, live, 0)
    at = (line // count * tl.load(row + SIZE) + index) * inner + k % inner
    return piece, row, tl.load(row + BASE) + k, at, live


@triton.jit
def _parts(x, row, scalars):
    """sgn(x) c(x) and sgn(x) R(x); x and 0 where nothing quantizes it."""
    layer = tl.load(row + LAYER)
    place = scalars + 3 * tl.maximum(layer, 0)
    sign, _, c = _mapped(x, tl.load(place + 1), tl.load(place + 2))
    codes = tl.div_rn(c, tl.load(place) + 0.0 * c)
    quantized = layer >= 0
    return tl.where(quantized, sign * c, x), tl.where(quantized, sign * (_whole(codes) - codes), 0.0)


@triton.jit
def gather(pieces, chunks, own, out, OWN: tl.constexpr, BLOCK: tl.constexpr):
    """out = the elements, 0 where an earlier piece has them."""
    _, row, flat, at, live = _places(pieces, chunks, BLOCK)
    parameter = tl.load(row + PARAMETER).to(tl.pointer_type(tl.float32))
    mine = live & (tl.load(own + flat, live, 0) != 0) if OWN else live
    tl.store(out + flat, tl.load(parameter + at, mine, 0.0), live)


@triton.jit
def products(pieces, grads, chunks, scalars, before, own, partial, OWN: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of g (before - now), g sgn c, g sgn R, |c|, 1 over a chunk; grads: int64 [P], addresses."""
    piece, row, flat, at, live = _places(pieces, chunks, BLOCK)
    mine = live & (tl.load(own + flat, live, 0) != 0) if OWN else live
    x = tl.load(before + flat, live, 0.0)
    now = tl.load(tl.load(row + PARAMETER).to(tl.pointer_type(tl.float32)) + at, mine, 0.0)
    g = tl.load(tl.load(grads + piece).to(tl.pointer_type(tl.float32)) + at, mine, 0.0)
    clipped, residual = _parts(x, row, scalars)
    out = partial + tl.program_id(0).to(tl.int64) * 5
    tl.store(out, tl.sum(g * (x - now)))
    tl.store(out + 1, tl.sum(g * clipped))
    tl.store(out + 2, tl.sum(g * residual))
    tl.store(out + 3, tl.sum(tl.abs(clipped)))
    tl.store(out + 4, tl.sum(mine.to(tl.float32)))


@triton.jit
def decay(pieces, chunks, scalars, steps, rates, before, own, OWN: tl.constexpr, BLOCK: tl.constexpr):
    """x <- x - gamma (sgn c + d sgn R); steps: float32 [L], NaN where nothing is chosen; rates: float32 [D]."""
    _, row, flat, at, live = _places(pieces, chunks, BLOCK)
    mine = live & (tl.load(own + flat, live, 0) != 0) if OWN else live
    clipped, residual = _parts(tl.load(before + flat, live, 0.0), row, scalars)
    d = tl.load(steps + tl.maximum(tl.load(row + LAYER), 0))
    d = tl.where(d == d, d, 0.0)
    away = tl.load(rates + tl.load(row + DIMENSION)) * (clipped + d * residual)
    parameter = tl.load(row + PARAMETER).to(tl.pointer_type(tl.float32)) + at
    tl.store(parameter, tl.load(parameter, mine, 0.0) - away, mine)


@triton.jit
def clear(pieces, chunks, BLOCK: tl.constexpr):
    """x <- 0."""
    _, row, _, at, live = _places(pieces, chunks, BLOCK)
    tl.store(tl.load(row + PARAMETER).to(tl.pointer_type(tl.float32)) + at, tl.zeros([BLOCK], tl.float32), live)
