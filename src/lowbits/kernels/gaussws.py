# SPDX-License-Identifier: Apache-2.0
"""Noise on a weight in one pass, and its gradient in one pass over the weight's.

The eager definition is `lowbits.methods._pseudo_noise`'s; results are equal to its bit for bit. A program works on NB
blocks of BR x BC elements side by side; nothing is read twice and R is never stored. Needs triton; imported where it is
used. Launch without fused multiply-adds (`enable_fp_fusion=False`): the definition rounds after every operation.

Sums and maxima go over columns, then over rows: over both at once, flattened, their lanes need not be neighbours, and
Triton 3.6 then shuffles over those of the next block instead (tests.kernels.compiling looks for such reductions).

    w, out      rows x columns, contiguous
    bits        float32 [down, across], b_i
    slopes      float32 [down, across], -ln 2 (b_init - b_target) D
    counter     int64 [3]: draw, two words of the key
    table       float32 [2^15], quantiles of |Z| / 2, for normal noise alone
"""

# Triton reads this file's source: annotations would be evaluated as its own types.

import triton
import triton.language as tl

from lowbits.kernels.blocks import INTERPRETED, _as_bf16  # noqa: F401  whether Triton interprets is asked of this file

# Distributions.
ROUNDED_NORMAL = tl.constexpr(0)
UNIFORM = tl.constexpr(1)
NORMAL = tl.constexpr(2)

_LANES = tl.constexpr(32)
_BESIDE = tl.constexpr(4)
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer
_SMALLEST_EXPONENT = tl.constexpr(-100)
# ln(2)^k / k!, as the definition has them; float32 rounds them.
_C13 = tl.constexpr(1.3691488853904124e-12)
_C12 = tl.constexpr(2.5678435993488196e-11)
_C11 = tl.constexpr(4.44553827187081e-10)
_C10 = tl.constexpr(7.054911620801121e-09)
_C9 = tl.constexpr(1.0178086009239696e-07)
_C8 = tl.constexpr(1.3215486790144305e-06)
_C7 = tl.constexpr(1.5252733804059838e-05)
_C6 = tl.constexpr(0.00015403530393381606)
_C5 = tl.constexpr(0.0013333558146428441)
_C4 = tl.constexpr(0.009618129107628477)
_C3 = tl.constexpr(0.055504108664821576)
_C2 = tl.constexpr(0.2402265069591007)
_C1 = tl.constexpr(0.6931471805599453)


@triton.jit
def _power_of_two(n):
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _exp2(x):
    whole = tl.floor(x + 0.5)
    f = x - whole
    y = tl.full(x.shape, _C13, tl.float32)
    y = y * f + _C12
    y = y * f + _C11
    y = y * f + _C10
    y = y * f + _C9
    y = y * f + _C8
    y = y * f + _C7
    y = y * f + _C6
    y = y * f + _C5
    y = y * f + _C4
    y = y * f + _C3
    y = y * f + _C2
    y = y * f + _C1
    y = y * f + 1.0
    return y * _power_of_two(whole.to(tl.int32))


@triton.jit
def _largest(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _philox(key, c0, c1, c2, c3):
    """Philox4x32-10. Products of 64 bits: one instruction each, where `tl.philox` has two."""
    k0, k1 = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        a, b = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = b.to(tl.uint32)
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = a.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _fold(acc, word, DIGIT: tl.constexpr):
    return acc | word if DIGIT else acc & word


@triton.jit
def _circuit(
    key, row, column, draw, GROUPS: tl.constexpr, N1: tl.constexpr, K1: tl.constexpr, N2: tl.constexpr, K2: tl.constexpr
):
    """m1, m2 and signs of every group of 32 elements, uint32 [NB, GROUPS]."""
    CALLS: tl.constexpr = (K1 + K2 + 1 + 3) // 4
    group = tl.arange(0, GROUPS)[None, :] * CALLS
    first = tl.zeros([column.shape[0], GROUPS], tl.uint32)
    m1, m2, sign = first, first, first
    for call in tl.static_range(CALLS):
        index = first + (group + call).to(tl.uint32)
        words = _philox(key, index, first + row, first + column[:, None], first + draw)
        for part in tl.static_range(4):
            if call * 4 + part < K1:
                m1 = _fold(m1, words[part], (N1 >> (call * 4 + part)) & 1)
            elif call * 4 + part < K1 + K2:
                m2 = _fold(m2, words[part], (N2 >> (call * 4 + part - K1)) & 1)
            elif call * 4 + part == K1 + K2:
                sign = words[part]
    # Gathered from where they are: the compiler would else draw them anew in every lane that needs them, four times.
    same = tl.broadcast_to(tl.arange(0, GROUPS)[None, :], [column.shape[0], GROUPS])
    return tl.gather(m1, same, 1), tl.gather(m1 & m2, same, 1), tl.gather(m1 & sign, same, 1)


@triton.jit
def _halves(key, row, column, draw, SIZE: tl.constexpr):
    """16 random bits an element, int32 [NB, SIZE]; a call serves 8 elements."""
    NB: tl.constexpr = column.shape[0]
    zero = tl.zeros([NB, SIZE // 8], tl.uint32)
    index = zero + tl.arange(0, SIZE // 8)[None, :].to(tl.uint32)
    w0, w1, w2, w3 = _philox(key, index, zero + row, zero + column[:, None], zero + draw)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(NB, SIZE // 2)
    return tl.interleave(words & 0xFFFF, words >> 16).to(tl.int32)


@triton.jit
def _noise(
    counter, table, row, column, NOISE: tl.constexpr, N1: tl.constexpr, K1: tl.constexpr, N2: tl.constexpr,
    K2: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """R of the blocks at `row` (of blocks) and `column` (a vector), float32 [NB, BR, BC]."""
    NB: tl.constexpr = column.shape[0]
    draw = (tl.load(counter) & 0xFFFFFFFF).to(tl.uint32)
    key = tl.load(counter + 1) | (tl.load(counter + 2) << 32)
    if NOISE == ROUNDED_NORMAL:
        m1, m2, sign = _circuit(key, row, column, draw, BR * BC // _LANES, N1, K1, N2, K2)
        # Shifted once for the elements that a thread has side by side, whose masks are then constants.
        down = tl.arange(0, _LANES // _BESIDE).to(tl.uint32)[None, None, :, None] * _BESIDE
        place = tl.arange(0, _BESIDE).to(tl.uint32)[None, None, None, :]
        one = ((m1[:, :, None, None] >> down) & (1 << place)) != 0
        two = ((m2[:, :, None, None] >> down) & (1 << place)) != 0
        flip = ((sign[:, :, None, None] >> down) << (31 - place)) & 0x80000000
        size = tl.where(two, 2.0, tl.where(one, 1.0, 0.0))
        r = (size.to(tl.uint32, bitcast=True) | flip).to(tl.float32, bitcast=True)
        r = r.reshape(NB, BR, BC)
    else:
        half = _halves(key, row, column, draw, BR * BC)
        if NOISE == UNIFORM:
            r = (half.to(tl.float32) + 0.5) * 0.0000152587890625 - 0.5
        else:
            size = tl.load(table + (half & 32767))
            r = tl.where(half >= 32768, -size, size)
        r = r.reshape(NB, BR, BC)
    return r


@triton.jit
def _to_grid(x, exponent, TOP: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr):
    """x on the grid of a format of few bits whose top binade is the block's."""
    n = exponent - TOP
    y = x * _power_of_two(-n)
    size = tl.abs(y)
    binade = tl.maximum(((size.to(tl.uint32, bitcast=True) >> 23) & 255).to(tl.int32) - 127, LEAST)
    places = binade - MANTISSA
    whole = (size * _power_of_two(-places) + _MAGIC) - _MAGIC
    size = tl.minimum(whole * _power_of_two(places), LARGEST)
    sign = y.to(tl.uint32, bitcast=True) & 0x80000000  # of zeros, too
    return (size.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True) * _power_of_two(n)


@triton.jit
def _tile(rows, columns, across, BR: tl.constexpr, BC: tl.constexpr, NB: tl.constexpr):
    """Row and columns of this program's blocks, where their elements are, and which of these there are."""
    tiles = tl.cdiv(across, NB)
    i = tl.program_id(0) // tiles
    j = (tl.program_id(0) % tiles) * NB + tl.arange(0, NB)
    r_index = i * BR + tl.arange(0, BR)[None, :, None]
    c_index = j[:, None, None] * BC + tl.arange(0, BC)[None, None, :]
    # Whatever their type, values are read and written by as many beside each other: they never change lanes.
    at = tl.max_contiguous(r_index.to(tl.int64) * columns + c_index, (1, 1, _BESIDE))
    return i, j, at, (r_index < rows) & (c_index < columns)


@triton.jit
def add_noise(
    w, bits, counter, table, out, slopes, rows, columns, down, across, first_row, first_column, b_target, b_span,
    least, most, amplitude, slope_factor, NOISE: tl.constexpr, N1: tl.constexpr, K1: tl.constexpr, N2: tl.constexpr,
    K2: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, NB: tl.constexpr, TO_BF16: tl.constexpr,
    TO_FP16: tl.constexpr, STORED: tl.constexpr, TOP: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr,
    LARGEST: tl.constexpr
):  # fmt: skip
    """out = cast(w + R D); slopes of all blocks."""
    i, j, at, mask = _tile(rows, columns, across, BR, BC, NB)
    x = tl.load(w + at, mask, 0.0).to(tl.float32)
    amax = tl.reduce(tl.reduce(tl.abs(x), 2, _largest), 1, _largest)
    live = j < across
    b = tl.load(bits + i * across + j, live, 0.0) * b_span + b_target
    clamped = tl.minimum(tl.maximum(b, least), most)
    delta = amax * _exp2(1.0 - clamped) * amplitude
    tl.store(slopes + i * across + j, tl.where(b == clamped, delta * slope_factor, 0.0), live)
    r = _noise(
        counter, table, (first_row + i).to(tl.uint32), (first_column + j).to(tl.uint32), NOISE, N1, K1, N2, K2, BR, BC
    )
    y = x + r * delta[:, None, None]
    if STORED:
        exponent = tl.maximum((amax.to(tl.uint32, bitcast=True) >> 23).to(tl.int32) - 127, _SMALLEST_EXPONENT)
        y = _to_grid(y, exponent[:, None, None], TOP, MANTISSA, LEAST, LARGEST)
    if TO_BF16:
        y = _as_bf16(y)
    if TO_FP16:
        y = y.to(tl.float16).to(tl.float32)
    if out.dtype.element_ty == tl.bfloat16:
        y = _as_bf16(y)
    tl.store(out + at, y.to(out.dtype.element_ty), mask)


@triton.jit
def gradients(
    g, counter, table, slopes, grad_w, grad_bits, rows, columns, down, across, first_row, first_column,
    NOISE: tl.constexpr, N1: tl.constexpr, K1: tl.constexpr, N2: tl.constexpr, K2: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr, NB: tl.constexpr, COPY: tl.constexpr
):  # fmt: skip
    """grad_bits = slope sum_B(G R), in float64; grad_w = G in its own type, unless it is G itself."""
    i, j, at, mask = _tile(rows, columns, across, BR, BC, NB)
    x = tl.load(g + at, mask, 0.0)
    if COPY:
        tl.store(grad_w + at, x.to(grad_w.dtype.element_ty), mask)
    r = _noise(
        counter, table, (first_row + i).to(tl.uint32), (first_column + j).to(tl.uint32), NOISE, N1, K1, N2, K2, BR, BC
    )
    if NOISE == ROUNDED_NORMAL:  # 0, +-1, +-2: exact in float32 already
        product = (x.to(tl.float32) * r).to(tl.float64)
    else:
        product = x.to(tl.float64) * r.to(tl.float64)
    total = tl.sum(tl.sum(product, 2), 1)
    live = j < across
    slope = tl.load(slopes + i * across + j, live, 0.0)
    tl.store(grad_bits + i * across + j, (total * slope.to(tl.float64)).to(tl.float32), live)


@triton.jit
def draw(
    counter, table, out, rows, columns, across, NOISE: tl.constexpr, N1: tl.constexpr, K1: tl.constexpr,
    N2: tl.constexpr, K2: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, NB: tl.constexpr
):  # fmt: skip
    """out = R, float32 [rows, columns]."""
    i, j, at, mask = _tile(rows, columns, across, BR, BC, NB)
    r = _noise(counter, table, i.to(tl.uint32), j.to(tl.uint32), NOISE, N1, K1, N2, K2, BR, BC)
    tl.store(out + at, r, mask)
