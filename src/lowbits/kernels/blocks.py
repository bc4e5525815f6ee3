# SPDX-License-Identifier: Apache-2.0
"""Block formats in one pass: rotate, scale, round, pack and decode tiles of a matrix, as Triton sees them.

`lowbits.quantizers` is the definition; each function here does one of its steps, in its order, each operation rounded
once (the kernels are compiled without contraction). A tile is [BR, BK] elements of an operand [R, K], which may lie in
memory either way round; what lies outside of the operand reads as 0.
"""

# Triton reads this file's source: annotations would be evaluated as its own types.

import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret

# Choices are strings, not constants of this module: Triton compares every constant that a kernel reads before each
# launch, which took as long as the launch.


@triton.jit
def _tile(x, row, column, R, K, stride_r, stride_k):
    inside = (row[:, None] < R) & (column[None, :] < K)
    at = row[:, None].to(tl.int64) * stride_r + column[None, :].to(tl.int64) * stride_k
    return tl.load(x + at, inside, 0.0).to(tl.float32)


@triton.jit
def _rotate(v, SIGNS: tl.constexpr, T: tl.constexpr, LOG: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    """`Hadamard.forward` but for its factor: sums and differences of neighbours, of pairs, ...; SIGNS negate."""
    minus = (tl.full([BK], SIGNS, tl.uint64) >> (tl.arange(0, BK) % T).to(tl.uint64)) & 1
    v = tl.where(minus[None, :] != 0, -v, v)
    v = v.reshape(BR * BK // T, T)
    for _ in tl.static_range(LOG):
        # The bit that was worked on goes to the front, so that the next one is the last; after LOG times all are back.
        a, b = tl.split(v.reshape(BR * BK // T, T // 2, 2))
        v = tl.permute(tl.join(a + b, a - b), (0, 2, 1)).reshape(BR * BK // T, T)
    return v.reshape(BR, BK)


if INTERPRETED:

    @triton.jit
    def _as_bf16(v):
        """To nearest even by hand: the interpreter cuts off."""
        bits = v.to(tl.uint32, bitcast=True)
        return tl.where(v == v, _as_float((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000), v)
else:

    @triton.jit
    def _as_bf16(v):
        return v.to(tl.bfloat16).to(tl.float32)


@triton.jit
def _scaled(v, SCALE: tl.constexpr, BF16: tl.constexpr):
    """What a rotation ends with: its factor, and bfloat16 where it computes in that."""
    return _as_bf16(v * SCALE) if BF16 else v * SCALE


@triton.jit
def _magnitude_bits(v):
    return v.to(tl.uint32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _as_float(bits):
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def _rounded(y, noise, M: tl.constexpr, LOWEST: tl.constexpr, MAX: tl.constexpr, ROUNDING: tl.constexpr):
    """`FloatFormat.project`: M mantissa bits, 2^LOWEST the smallest normal number; noise: of `_noise`."""
    magnitude = tl.abs(y)
    magnitude = tl.where(magnitude > MAX, MAX, magnitude)
    bits = magnitude.to(tl.uint32, bitcast=True)
    SHIFT: tl.constexpr = 23 - M
    below = magnitude * (2.0 ** (M - LOWEST))
    if ROUNDING == "NEAREST":
        normal = ((bits + ((1 << (SHIFT - 1)) - 1) + ((bits >> SHIFT) & 1)) >> SHIFT) << SHIFT
        small = (below + 12582912.0) - 12582912.0  # 1.5 * 2^23: float32 rounds to integers there, ties to even
    else:
        MASK: tl.constexpr = (1 << SHIFT) - 1
        if ROUNDING == "UNIFORM24":
            # The mantissa's tail as a number in [1, 2), less 1: converting integers takes eight times as long.
            fraction = _as_float(0x3F800000 | ((bits & MASK) << (23 - SHIFT))) - 1.0
            normal = ((bits >> SHIFT) + (noise < fraction).to(tl.uint32)) << SHIFT
        else:
            # Up where the tail is above (k + 1/2) / 256, or from (k + 1) / 256 on: where adding the rest carries.
            rest: tl.constexpr = MASK - (1 << (SHIFT - 9)) if ROUNDING == "CENTRED8" else MASK + 1 - (1 << (SHIFT - 8))
            normal = (bits + (rest - (noise << (SHIFT - 8)))) & (0xFFFFFFFF - MASK)
            noise = _of_byte(noise, ROUNDING)
        floor = tl.where(below >= 1.0, 1.0, 0.0) if M == 1 else tl.floor(below)
        small = floor + (noise < below - floor).to(tl.float32)
    value = tl.where(magnitude < 2.0**LOWEST, small * (2.0 ** (LOWEST - M)), _as_float(normal))
    signed = _as_float(value.to(tl.uint32, bitcast=True) | (y.to(tl.uint32, bitcast=True) & 0x80000000))
    return tl.where(y == y, signed, y)


@triton.jit
def _nearest_code(y, M: tl.constexpr, LOWEST: tl.constexpr, MAX: tl.constexpr, BITS: tl.constexpr, NAN: tl.constexpr):
    """`_encoded` of what `_rounded` makes of y, to nearest, without the number between."""
    magnitude = tl.abs(y)
    magnitude = tl.where(magnitude > MAX, MAX, magnitude)
    bits = magnitude.to(tl.uint32, bitcast=True)
    SHIFT: tl.constexpr = 23 - M
    up = (bits + ((1 << (SHIFT - 1)) - 1) + ((bits >> SHIFT) & 1)) >> SHIFT
    normal = up.to(tl.int32) - ((126 + LOWEST) << M)
    small = (magnitude * (2.0 ** (M - LOWEST)) + 8388608.0).to(tl.int32, bitcast=True) & 255
    code = tl.where(magnitude < 2.0**LOWEST, small, normal)
    code = code | ((y.to(tl.uint32, bitcast=True) >> 31).to(tl.int32) << (BITS - 1))
    return tl.where(y == y, code, NAN)


@triton.jit
def _encoded(value, M: tl.constexpr, LOWEST: tl.constexpr, BITS: tl.constexpr, NAN: tl.constexpr):
    """`FloatFormat.encode`."""
    bits = _magnitude_bits(value)
    normal = (bits >> (23 - M)).to(tl.int32) - ((126 + LOWEST) << M)
    magnitude = bits.to(tl.float32, bitcast=True)
    small = (magnitude * (2.0 ** (M - LOWEST)) + 8388608.0).to(tl.int32, bitcast=True) & 255  # 2^23: an integer in bits
    code = tl.where(magnitude < 2.0**LOWEST, small, normal)
    code = code | ((value.to(tl.uint32, bitcast=True) >> 31).to(tl.int32) << (BITS - 1))
    return tl.where(value == value, code, NAN)


@triton.jit
def _decoded(code, M: tl.constexpr, LOWEST: tl.constexpr, BITS: tl.constexpr, NAN: tl.constexpr):
    """`FloatFormat.decode`; NAN is the magnitude code that is no number, 0 for none."""
    magnitude = code & ((1 << (BITS - 1)) - 1)
    normal = _as_float((magnitude + ((126 + LOWEST) << M)) << (23 - M))
    value = tl.where(magnitude < (1 << M), magnitude.to(tl.float32) * (2.0 ** (LOWEST - M)), normal)
    value = tl.where(code >> (BITS - 1) != 0, -value, value)
    if NAN != 0:
        value = tl.where(magnitude == NAN, float("nan"), value)
    return value


@triton.jit
def _two_to(biased):
    return _as_float(tl.where(biased == 0, 1 << 22, biased << 23))


@triton.jit
def _scales(amax, whole, MAX: tl.constexpr, TOP: tl.constexpr, INVERSE: tl.constexpr, RULE: tl.constexpr):
    """Scale, what x is multiplied by, and the outer scale, of blocks with these amaxes in a tensor of amax `whole`."""
    if RULE == "TWO_LEVEL" or RULE == "TWO_LEVEL_POW2" or RULE == "TWO_LEVEL_UP":
        outer = tl.div_rn(448.0 * MAX, whole)
        outer = tl.where(outer > 3.4028234663852886e38, 3.4028234663852886e38, outer)
        if RULE == "TWO_LEVEL_POW2":
            outer = tl.where(outer == outer, _as_float(outer.to(tl.uint32, bitcast=True) & 0xFF800000), outer)
        outer = tl.where((outer == 0) | (whole == 0), 1.0, outer)
        target = amax * (outer * INVERSE)
        target = tl.where(target > 448.0, 448.0, target)
        scale = _rounded(target, target, 3, -6, 448.0, "NEAREST")
        if RULE == "TWO_LEVEL_UP":
            exponent = _as_float(scale.to(tl.uint32, bitcast=True) & 0xFF800000)
            scale = tl.where(scale < target, scale + tl.maximum(exponent, 2.0**-6) * 0.125, scale)
        decode = tl.div_rn(1.0, outer)
        combined = scale * decode
        encode = tl.div_rn(1.0, combined)
        return scale, tl.where(encode > 3.4028234663852886e38, 3.4028234663852886e38, encode), decode
    elif RULE == "POWER_OF_TWO":
        quotient = tl.div_rn(amax, MAX)
        scale = tl.where(amax == 0, 1.0, tl.maximum(quotient, 2.0**-126))
        bits = scale.to(tl.uint32, bitcast=True)
        scale = _as_float((bits + 0x7FFFFF) & 0xFF800000)
        scale = tl.where(amax <= 3.4028234663852886e38, scale, float("nan"))
        return scale, tl.div_rn(1.0, scale), whole
    else:
        if RULE == "SHARED_UP":
            bits = tl.div_rn(amax, MAX).to(tl.int32, bitcast=True)
            exponent = bits >> 23
            more = (bits & 0x7FFFFF) > tl.where(exponent == 0, 1 << 22, 0)
            biased = exponent + more.to(tl.int32)
        else:
            biased = (amax.to(tl.int32, bitcast=True) >> 23) - TOP
        biased = tl.minimum(tl.maximum(biased, 0), 254)
        return tl.where(amax <= 3.4028234663852886e38, _two_to(biased), float("nan")), _two_to(254 - biased), whole


@triton.jit
def _four(w0, w1, w2, w3, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(ROWS, COLUMNS)


@triton.jit
def _of_byte(byte, ROUNDING: tl.constexpr):
    """8 random bits as `QuantSpec.draw` has them; 2^23 + byte is a float32 with the byte in its lowest bits."""
    if ROUNDING == "CENTRED8":
        return (_as_float(byte | 0x4B000000) - 8388607.5) * (2.0**-8)
    else:
        return (_as_float(byte | 0x4B000000) - 8388607.0) * (2.0**-8) * (1 - 2.0**-24)


@triton.jit
def _noise(noise, role, row, first, KP, ROUNDING: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    """`QuantSpec.draw` for a tile, or its bytes: 4 or 16 elements a counter; KP is a multiple of that."""
    EACH: tl.constexpr = 4 if ROUNDING == "UNIFORM24" else 16
    step = tl.load(noise)
    key = tl.load(noise + role).to(tl.uint64) | (tl.load(noise + role + 1).to(tl.uint64) << 32)
    column = first // EACH + tl.arange(0, BK // EACH)
    counter = row[:, None].to(tl.int64) * (KP // EACH) + column[None, :]
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    step_low, step_high = tl.zeros_like(low) + step.to(tl.uint32), tl.zeros_like(low) + (step >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, low, high, step_low, step_high)
    words = _four(w0, w1, w2, w3, BR, BK // EACH * 4)
    if ROUNDING == "UNIFORM24":  # with its `else`: Triton 3.6 goes on behind a return
        return (words >> 8).to(tl.int32).to(tl.float32) * (2.0**-24)
    else:
        return _four(words & 255, (words >> 8) & 255, (words >> 16) & 255, words >> 24, BR, BK)


@triton.jit
def amax(
    x, result, R, K, stride_r, stride_k, SIGNS: tl.constexpr, SCALE: tl.constexpr, BF16: tl.constexpr, T: tl.constexpr,
    LOG: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """The bits of the largest magnitude of x, rotated where T > 1, into `result`, which was 0. NaN is the largest."""
    # Backwards: what was written last, and what the quantizer reads first, is still in the cache.
    across, down = tl.num_programs(0) - 1 - tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    v = _tile(x, down * BR + tl.arange(0, BR), across * BK + tl.arange(0, BK), R, K, stride_r,
              stride_k)  # fmt: skip
    if T > 1:
        v = _rotate(v, SIGNS, T, LOG, BR, BK)
    largest = tl.max(tl.max(_magnitude_bits(v).to(tl.int32, bitcast=True), 1), 0)
    if T > 1:  # rounding keeps the order: the largest is rounded alone
        largest = _scaled(largest.to(tl.float32, bitcast=True), SCALE, BF16).to(tl.int32, bitcast=True)
    tl.atomic_max(result, largest, sem="relaxed")


@triton.jit
def quantize(
    x, noise, whole, inner, codes, scales, outer, role, R, K, KP, stride_r, stride_k, SIGNS: tl.constexpr,
    SCALE: tl.constexpr, BF16: tl.constexpr, T: tl.constexpr, LOG: tl.constexpr, M: tl.constexpr, LOWEST: tl.constexpr,
    MAX: tl.constexpr, TOP: tl.constexpr, INVERSE: tl.constexpr, BITS: tl.constexpr, NAN: tl.constexpr,
    RULE: tl.constexpr, ROUNDING: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
    CODES: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Quantize x into what a GEMM multiplies (INNER), and into codes and scales as they are stored (CODES)."""
    row, first = tl.program_id(1) * BR + tl.arange(0, BR), tl.program_id(0) * BK
    column = first + tl.arange(0, BK)
    v = _tile(x, row, column, R, K, stride_r, stride_k)
    if T > 1:
        v = _scaled(_rotate(v, SIGNS, T, LOG, BR, BK), SCALE, BF16)
    u = v
    if ROUNDING != "NEAREST":
        u = _noise(noise, role, row, first, KP, ROUNDING, BR, BK)
    largest = tl.max(tl.max(_magnitude_bits(v).reshape(BR // ROWS, ROWS, BK // COLUMNS, COLUMNS), 3), 1)
    whole_amax = tl.load(whole).to(tl.float32, bitcast=True)
    scale, encode, decode = _scales(largest.to(tl.float32, bitcast=True), whole_amax, MAX, TOP, INVERSE, RULE)
    spread = tl.broadcast_to(encode[:, None, :, None], (BR // ROWS, ROWS, BK // COLUMNS, COLUMNS)).reshape(BR, BK)
    inside = (row[:, None] < R) & (column[None, :] < KP)
    if CODES and ROUNDING == "NEAREST":
        code = _nearest_code(v * spread, M, LOWEST, MAX, BITS, NAN)
    else:
        value = _rounded(v * spread, u, M, LOWEST, MAX, ROUNDING)
        code = _encoded(value, M, LOWEST, BITS, NAN)
    if INNER:
        factor = scale
        if RULE == "TWO_LEVEL_POW2":
            factor = scale * decode
        spread = tl.broadcast_to(factor[:, None, :, None], (BR // ROWS, ROWS, BK // COLUMNS, COLUMNS)).reshape(BR, BK)
        tl.store(inner + row[:, None].to(tl.int64) * KP + column[None, :], (value * spread).to(inner.dtype.element_ty),
                 inside)  # fmt: skip
    if RULE == "TWO_LEVEL" or RULE == "TWO_LEVEL_POW2" or RULE == "TWO_LEVEL_UP":
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(outer, decode)
    if CODES:
        if BITS == 4:
            low, high = tl.split(code.reshape(BR, BK // 2, 2))
            pair = first // 2 + tl.arange(0, BK // 2)
            tl.store(codes + row[:, None].to(tl.int64) * (KP // 2) + pair[None, :], (low | (high << 4)).to(tl.uint8),
                     (row[:, None] < R) & (pair[None, :] < KP // 2))  # fmt: skip
        else:
            tl.store(codes + row[:, None].to(tl.int64) * KP + column[None, :], code.to(tl.uint8), inside)
        across, down = (KP + COLUMNS - 1) // COLUMNS, (R + ROWS - 1) // ROWS
        block_row = tl.program_id(1) * (BR // ROWS) + tl.arange(0, BR // ROWS)
        block = first // COLUMNS + tl.arange(0, BK // COLUMNS)
        at = scales + block_row[:, None].to(tl.int64) * across + block[None, :]
        known = (block_row[:, None] < down) & (block[None, :] < across)
        if RULE == "POWER_OF_TWO":
            tl.store(at, scale, known)
        elif RULE == "SHARED_UP" or RULE == "SHARED_FLOOR":
            exponent = (scale.to(tl.uint32, bitcast=True) >> 23).to(tl.int32)
            tl.store(at, tl.where(scale == scale, exponent, 255).to(tl.uint8), known)
        else:
            tl.store(at, _encoded(scale, 3, -6, 8, 127).to(tl.uint8), known)


@triton.jit
def decode(
    codes, scales, outer, inner, R, KP, M: tl.constexpr, LOWEST: tl.constexpr, BITS: tl.constexpr, NAN: tl.constexpr,
    RULE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """What a GEMM multiplies, from stored codes and scales."""
    row, first = tl.program_id(1) * BR + tl.arange(0, BR), tl.program_id(0) * BK
    column = first + tl.arange(0, BK)
    inside = (row[:, None] < R) & (column[None, :] < KP)
    if BITS == 4:
        pair = first // 2 + tl.arange(0, BK // 2)
        both = tl.load(codes + row[:, None].to(tl.int64) * (KP // 2) + pair[None, :],
                       (row[:, None] < R) & (pair[None, :] < KP // 2), 0).to(tl.int32)  # fmt: skip
        code = tl.join(both & 15, both >> 4).reshape(BR, BK)
    else:
        code = tl.load(codes + row[:, None].to(tl.int64) * KP + column[None, :], inside, 0).to(tl.int32)
    across = (KP + COLUMNS - 1) // COLUMNS
    block_row = tl.program_id(1) * (BR // ROWS) + tl.arange(0, BR // ROWS)
    block = first // COLUMNS + tl.arange(0, BK // COLUMNS)
    known = (block_row[:, None] < (R + ROWS - 1) // ROWS) & (block[None, :] < across)
    stored = tl.load(scales + block_row[:, None].to(tl.int64) * across + block[None, :], known, 0)
    if RULE == "POWER_OF_TWO":
        scale = stored
    elif RULE == "SHARED_UP" or RULE == "SHARED_FLOOR":
        biased = stored.to(tl.int32)
        scale = tl.where(biased == 255, float("nan"), _two_to(biased))
    else:
        scale = _decoded(stored.to(tl.int32), 3, -6, 8, 127)
        if RULE == "TWO_LEVEL_POW2":
            scale = scale * tl.load(outer)
    spread = tl.broadcast_to(scale[:, None, :, None], (BR // ROWS, ROWS, BK // COLUMNS, COLUMNS)).reshape(BR, BK)
    value = _decoded(code, M, LOWEST, BITS, NAN) * spread
    tl.store(inner + row[:, None].to(tl.int64) * KP + column[None, :], value.to(inner.dtype.element_ty), inside)
