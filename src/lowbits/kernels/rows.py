# SPDX-License-Identifier: Apache-2.0
"""Quantize a matrix along both of its axes, with one scale a row, a column, the whole, or a block of 128, as Triton
sees it.

`lowbits.quantizers` is the definition; each function does one of its steps, each operation rounded once (the kernels
are compiled without contraction). Two launches: the largest magnitudes of both axes in one read of x, then both copies
in another; one for blocks, whose magnitudes a program finds in its tile. What lies outside of x reads as 0 and changes
no amax.
"""

# Triton reads this file's source: annotations would be evaluated as its own types.

import triton
import triton.language as tl

from lowbits.kernels.blocks import (
    INTERPRETED,
    _as_bf16,
    _as_float,
    _decoded,
    _encoded,
    _magnitude_bits,
    _rounded,
    _two_to,
)


@triton.jit
def _tile(x, row, column, R, K, stride_r, stride_k):
    inside = (row[:, None] < R) & (column[None, :] < K)
    at = row[:, None].to(tl.int64) * stride_r + column[None, :].to(tl.int64) * stride_k
    return tl.load(x + at, inside, 0.0).to(tl.float32)


@triton.jit
def _bits(v):
    """Of magnitudes, which have their order; NaN is the largest."""
    return _magnitude_bits(v).to(tl.int32, bitcast=True)


@triton.jit
def _behind(R, OF_K: tl.constexpr):
    """Where the columns' largest magnitudes lie, behind those of the rows."""
    if OF_K == "ROW":
        return R
    else:
        return R * 0 + (1 if OF_K == "TENSOR" else 0)


@triton.jit
def _amax(
    x, result, R, K, stride_r, stride_k, across, down, OF_K: tl.constexpr, OF_R: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr, STEPS: tl.constexpr
):  # fmt: skip
    """A program walks down STEPS tiles, for fewer atomic maxima; their order changes nothing."""
    column = across * BK + tl.arange(0, BK)
    largest = tl.zeros((BR, BK), tl.int32)
    for step in range(STEPS):
        row = (down * STEPS + step) * BR + tl.arange(0, BR)
        bits = _bits(_tile(x, row, column, R, K, stride_r, stride_k))
        if OF_K == "ROW":
            tl.atomic_max(result + row, tl.max(bits, 1), row < R, sem="relaxed")
        largest = tl.maximum(largest, bits)
    behind = result + _behind(R, OF_K)
    if OF_R == "ROW":
        tl.atomic_max(behind + column, tl.max(largest, 0), column < K, sem="relaxed")
    if OF_K == "TENSOR" or OF_R == "TENSOR":
        whole = tl.max(tl.max(largest, 1), 0)
        if OF_K == "TENSOR":
            tl.atomic_max(result, whole, sem="relaxed")
        if OF_R == "TENSOR":
            tl.atomic_max(behind, whole, sem="relaxed")


@triton.jit
def amax(
    x, result, R, K, stride_r, stride_k, OF_K: tl.constexpr, OF_R: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    STEPS: tl.constexpr
):  # fmt: skip
    """The bits of the largest magnitudes: [R] or one for the copy along k, then [K] or one for that along r; were 0."""
    # Backwards: what was written last, and what the quantizer reads first, is still in the cache.
    across, down = tl.num_programs(0) - 1 - tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    _amax(x, result, R, K, stride_r, stride_k, across, down, OF_K, OF_R, BR, BK, STEPS)


@triton.jit
def _scales(bits, MAX: tl.constexpr, FLOOR: tl.constexpr, TOP: tl.constexpr, RULE: tl.constexpr):
    """Scale, and what x is divided by (or multiplied by, if RECIPROCAL), of rows with these amaxes.

    TOP is what amaxes below FLOOR are multiplied by, if RECIPROCAL.
    """
    largest = bits.to(tl.float32, bitcast=True)
    finite = largest <= 3.4028234663852886e38
    if RULE == "RECIPROCAL":
        encode = tl.where(largest < FLOOR, TOP, tl.div_rn(MAX, largest))
        encode = tl.where(finite, encode, float("nan"))
        return tl.div_rn(1.0, encode), encode
    else:
        largest = tl.where(largest < FLOOR, FLOOR, largest)
        scale = tl.div_rn(largest, MAX)
        scale = tl.where(largest == 0, 1.0, tl.where(scale < 2.0**-126, 2.0**-126, scale))
        if RULE == "POWER_OF_TWO":
            scale = _as_float((scale.to(tl.uint32, bitcast=True) + 0x7FFFFF) & 0xFF800000)
        scale = tl.where(finite, scale, float("nan"))
        return scale, scale


if INTERPRETED:  # numpy has no fused multiply-add, the interpreter no cast to 8 bits

    @triton.jit
    def _quotient(v, scale):
        return tl.div_rn(v, scale)

    @triton.jit
    def _float8(y, HIGH: tl.constexpr, M: tl.constexpr, LOWEST: tl.constexpr, TYPE: tl.constexpr):
        value = _rounded(y, y, M, LOWEST, HIGH, "NEAREST")
        return _encoded(value, M, LOWEST, 8, 127).to(tl.uint8).to(TYPE, bitcast=True)
else:

    @triton.jit
    def _quotient(v, scale):
        """v / scale, rounded once, for |v| up to 2^8 scale; what rounds to 0 on any grid may be off.

        A third of the division's instructions: with the scale brought to [1, 2), v times its reciprocal is two units
        off at most, and two corrections by the exact remainder leave the nearest number (Markstein 1990, IBM J. Res.
        Dev. 34(1)).
        """
        bits = scale.to(tl.uint32, bitcast=True)
        divisor = _as_float((bits & 0x7FFFFF) | 0x3F800000)
        reciprocal = tl.div_rn(1.0, divisor)
        v = v * _two_to(254 - (bits >> 23).to(tl.int32))
        q = v * reciprocal
        q = tl.fma(tl.fma(-q, divisor, v), reciprocal, q)
        return tl.fma(tl.fma(-q, divisor, v), reciprocal, q)

    @triton.jit
    def _float8(y, HIGH: tl.constexpr, M: tl.constexpr, LOWEST: tl.constexpr, TYPE: tl.constexpr):
        return y.to(TYPE)  # to nearest even, saturating: one instruction


@triton.jit
def _signed(y, v):
    """y with the sign of v, which it lost if it is 0."""
    return _as_float(y.to(tl.uint32, bitcast=True) | (v.to(tl.uint32, bitcast=True) & 0x80000000))


@triton.jit
def _target(v, by, RULE: tl.constexpr):
    """What is rounded; corrections of a quotient that underflowed lose the sign of its zero."""
    if RULE == "RECIPROCAL":
        return v * by
    elif RULE == "POWER_OF_TWO":
        return v * tl.div_rn(1.0, by)  # exact, as the division would be
    else:
        return _quotient(v, by)


@triton.jit
def _codes(v, by, HIGH: tl.constexpr, M: tl.constexpr, LOWEST: tl.constexpr, RULE: tl.constexpr, TYPE: tl.constexpr):
    """`Format.project` of v under its scale, as the bytes of TYPE: int8, or an FP8 with M mantissa bits."""
    y = _target(v, by, RULE)
    if TYPE != tl.int8 and RULE == "AMAX":
        y = _signed(y, v)
    if TYPE == tl.int8:
        # 1.5 * 2^23: float32 rounds to integers there, ties to even, and holds them in its lowest bits. The scale is
        # that of the largest magnitude, so nothing leaves the grid.
        return (y + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        return _float8(y, HIGH, M, LOWEST, TYPE)


@triton.jit
def _quantize(
    x, largest, codes_k, scale_k, codes_r, scale_r, R, K, KP, RP, stride_r, stride_k, across, down,
    OF_K: tl.constexpr, HIGH_K: tl.constexpr, M_K: tl.constexpr, LOWEST_K: tl.constexpr,
    FLOOR_K: tl.constexpr, TOP_K: tl.constexpr, RULE_K: tl.constexpr,
    OF_R: tl.constexpr, HIGH_R: tl.constexpr, M_R: tl.constexpr, LOWEST_R: tl.constexpr,
    FLOOR_R: tl.constexpr, TOP_R: tl.constexpr, RULE_R: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    row, column = down * BR + tl.arange(0, BR), across * BK + tl.arange(0, BK)
    v = _tile(x, row, column, R, K, stride_r, stride_k)
    if OF_K != "NONE":
        if OF_K == "GROUP":
            bits, to, known = tl.max(_bits(v), 1), across.to(tl.int64) * R + row, row < R
        elif OF_K == "TILE":
            bits = tl.max(tl.max(_bits(v), 1), 0) + row * 0
            to, known = row * 0 + down * tl.cdiv(K, BK) + across, row % BR == 0
        else:
            to = row if OF_K == "ROW" else row * 0
            bits = tl.load(largest + to, row < R, 0)
            known = (row < (R if OF_K == "ROW" else 1)) & (across == 0)
        scale, by = _scales(bits, HIGH_K, FLOOR_K, TOP_K, RULE_K)
        code = _codes(v, by[:, None], HIGH_K, M_K, LOWEST_K, RULE_K, codes_k.dtype.element_ty)
        at = codes_k + row[:, None].to(tl.int64) * KP + column[None, :]
        tl.store(at, code, (row[:, None] < R) & (column[None, :] < KP))
        tl.store(scale_k + to, scale, known)
    if OF_R != "NONE":
        if OF_R == "GROUP":
            bits, to, known = tl.max(_bits(v), 0), down.to(tl.int64) * K + column, column < K
        elif OF_R == "TILE":
            bits = tl.max(tl.max(_bits(v), 1), 0) + column * 0
            to, known = column * 0 + across * tl.cdiv(R, BR) + down, column % BK == 0
        else:
            to = column if OF_R == "ROW" else column * 0
            bits = tl.load(largest + _behind(R, OF_K) + to, column < K, 0)
            known = (column < (K if OF_R == "ROW" else 1)) & (down == 0)
        scale, by = _scales(bits, HIGH_R, FLOOR_R, TOP_R, RULE_R)
        code = tl.trans(_codes(v, by[None, :], HIGH_R, M_R, LOWEST_R, RULE_R, codes_r.dtype.element_ty))
        at = codes_r + column[:, None].to(tl.int64) * RP + row[None, :]
        tl.store(at, code, (column[:, None] < K) & (row[None, :] < RP))
        tl.store(scale_r + to, scale, known)


@triton.jit
def quantize(
    x, largest, codes_k, scale_k, codes_r, scale_r, R, K, KP, RP, stride_r, stride_k,
    OF_K: tl.constexpr, HIGH_K: tl.constexpr, M_K: tl.constexpr, LOWEST_K: tl.constexpr,
    FLOOR_K: tl.constexpr, TOP_K: tl.constexpr, RULE_K: tl.constexpr,
    OF_R: tl.constexpr, HIGH_R: tl.constexpr, M_R: tl.constexpr, LOWEST_R: tl.constexpr,
    FLOOR_R: tl.constexpr, TOP_R: tl.constexpr, RULE_R: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """The copy along k, codes [R, KP], and that along r, codes [K, RP], each with its scales.

    A scale a row or one; for a GROUP of BK (BR) elements scales [groups, rows], so that a GEMM reads those of one group
    together; for a TILE scales [rows, columns] of tiles. `largest`: see `amax`.
    """
    _quantize(x, largest, codes_k, scale_k, codes_r, scale_r, R, K, KP, RP, stride_r, stride_k, tl.program_id(0),
              tl.program_id(1), OF_K, HIGH_K, M_K, LOWEST_K, FLOOR_K, TOP_K, RULE_K, OF_R, HIGH_R, M_R, LOWEST_R,
              FLOOR_R, TOP_R, RULE_R, BR, BK)  # fmt: skip


@triton.jit
def _store_decoded(to, value, inside):
    if to.dtype.element_ty == tl.bfloat16:
        value = _as_bf16(value)
    tl.store(to, value.to(to.dtype.element_ty), inside)


@triton.jit
def quantize_operand(
    x, largest, inner, codes, scales, R, K, stride_r, stride_k, inner_r, inner_k, codes_r, codes_k, OF: tl.constexpr,
    HIGH: tl.constexpr, M: tl.constexpr, LOWEST: tl.constexpr, FLOOR: tl.constexpr, TOP: tl.constexpr,
    RULE: tl.constexpr, SCALED: tl.constexpr, NUMBERS: tl.constexpr, CODES: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr
):  # fmt: skip
    """Quantize x into what a GEMM multiplies if NUMBERS, times its scales if SCALED, and into stored bytes if CODES.

    Rounds in float32, so that GPUs without FP8 do it, too. M is 0 for integers. `largest`: see `amax`.
    """
    row, column = tl.program_id(1) * BR + tl.arange(0, BR), tl.program_id(0) * BK + tl.arange(0, BK)
    v = _tile(x, row, column, R, K, stride_r, stride_k)
    to = row if OF == "ROW" else row * 0
    scale, by = _scales(tl.load(largest + to, row < R, 0), HIGH, FLOOR, TOP, RULE)
    tl.store(scales + to, scale, (row < (R if OF == "ROW" else 1)) & (tl.program_id(0) == 0))
    y = _target(v, by[:, None], RULE)
    if M == 0:
        value = (y + 12582912.0) - 12582912.0  # see `_codes`
    else:
        value = _rounded(y, y, M, LOWEST, HIGH, "NEAREST")
    value = _signed(value, v)
    row, inside = row[:, None].to(tl.int64), (row[:, None] < R) & (column[None, :] < K)
    column = column[None, :].to(tl.int64)
    if CODES:
        if M == 0:  # NaN sits in the scale
            code = tl.where(value == value, value, 0.0).to(tl.int32) & 255
        else:
            code = _encoded(value, M, LOWEST, 8, 127)
        tl.store(codes + row * codes_r + column * codes_k, code.to(tl.uint8), inside)
    if NUMBERS:
        _store_decoded(inner + row * inner_r + column * inner_k, value * scale[:, None] if SCALED else value, inside)


@triton.jit
def decode(
    codes, scales, inner, R, K, codes_r, codes_k, inner_r, inner_k, OF: tl.constexpr, M: tl.constexpr,
    LOWEST: tl.constexpr, SCALED: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """What `quantize_operand` makes of x, from the bytes and the scales that it stored."""
    row, column = tl.program_id(1) * BR + tl.arange(0, BR), tl.program_id(0) * BK + tl.arange(0, BK)
    inside = (row[:, None] < R) & (column[None, :] < K)
    scale = tl.load(scales + (row if OF == "ROW" else row * 0), row < R, 1.0)[:, None]
    row, column = row[:, None].to(tl.int64), column[None, :].to(tl.int64)
    code = tl.load(codes + row * codes_r + column * codes_k, inside, 0).to(tl.int32)
    if M == 0:
        value = ((code ^ 128) - 128).to(tl.float32)
    else:
        value = _decoded(code, M, LOWEST, 8, 127)
    _store_decoded(inner + row * inner_r + column * inner_k, value * scale if SCALED else value, inside)


# --- many matrices in one launch ------------------------------------------------------------------------------------


@triton.jit
def _of_tile(tiles, matrices, BF16: tl.constexpr):
    """This program's matrix, and the place of its tile.

    Of a matrix eight int64 are known: its address, rows / 16, columns / 16, and where it begins among the largest
    magnitudes, the codes along k and along r (/ 16), the scales along k and along r. Told in sixteens, sizes are known
    to be multiples, and loads are wide. Of a tile three int32: matrix, place across, place down.
    """
    tile = tiles + tl.program_id(0).to(tl.int64) * 3
    matrix = matrices + tl.load(tile).to(tl.int64) * 8
    if BF16:
        x = tl.load(matrix).to(tl.pointer_type(tl.bfloat16))
    else:
        x = tl.load(matrix).to(tl.pointer_type(tl.float32))
    rows, columns = tl.load(matrix + 1).to(tl.int32) * 16, tl.load(matrix + 2).to(tl.int32) * 16
    return tl.multiple_of(x, 16), rows, columns, matrix, tl.load(tile + 1), tl.load(tile + 2)


@triton.jit
def amax_each(
    tiles, matrices, result, OF_K: tl.constexpr, OF_R: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    BF16: tl.constexpr
):  # fmt: skip
    """`amax` of contiguous matrices."""
    x, R, K, matrix, across, down = _of_tile(tiles, matrices, BF16)
    _amax(x, result + tl.load(matrix + 3), R, K, K, 1, across, down, OF_K, OF_R, BR, BK, 1)


@triton.jit
def quantize_each(
    tiles, matrices, largest, codes_k, scale_k, codes_r, scale_r,
    OF_K: tl.constexpr, HIGH_K: tl.constexpr, M_K: tl.constexpr, LOWEST_K: tl.constexpr,
    FLOOR_K: tl.constexpr, TOP_K: tl.constexpr, RULE_K: tl.constexpr,
    OF_R: tl.constexpr, HIGH_R: tl.constexpr, M_R: tl.constexpr, LOWEST_R: tl.constexpr,
    FLOOR_R: tl.constexpr, TOP_R: tl.constexpr, RULE_R: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    BF16: tl.constexpr
):  # fmt: skip
    """`quantize` of contiguous matrices whose sides are multiples of 16."""
    x, R, K, matrix, across, down = _of_tile(tiles, matrices, BF16)
    _quantize(x, largest + tl.load(matrix + 3), codes_k + tl.load(matrix + 4) * 16, scale_k + tl.load(matrix + 6),
              codes_r + tl.load(matrix + 5) * 16, scale_r + tl.load(matrix + 7), R, K, K, R, K, 1, across, down,
              OF_K, HIGH_K, M_K, LOWEST_K, FLOOR_K, TOP_K, RULE_K, OF_R, HIGH_R, M_R, LOWEST_R, FLOOR_R, TOP_R, RULE_R,
              BR, BK)  # fmt: skip
