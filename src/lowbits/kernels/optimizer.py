# SPDX-License-Identifier: Apache-2.0
"""One optimizer step of a whole model in at most three launches: `squares`, `prepare`, `update`.

What is to be done lies in tables on the device, a row for each parameter, so the number of tensors costs no launches:

    rows      int64 [R, COLUMNS]  addresses and sizes, see the constants below
    scalars   float32 [R, WIDTH]  lr, constants and corrections of the rule; then t and the gradient's factor
    bases     float64 [R, 2]      the decay rates whose powers `prepare` needs
    chunks    int64 [C]           row << 40 | first block: what one program of `update` works on
    points    float32 [256]       of a moment: what each code stands for in a block of scale 1
    steps     int32               of a moment coded by a code book, where codes end; points at the entry of y = 0

A parameter may itself be codes, one, two or four a byte (GRID); see `optimizer_grid`.

The eager definitions are `lowbits.optim`'s; codes, scales, moments and parameters are equal to theirs bit for bit.
Needs triton; imported where it is used.
"""

# Triton reads this file's source: annotations would be evaluated as its own types.

import triton
import triton.language as tl

from lowbits.kernels import optimizer_grid as grids
from lowbits.kernels import optimizer_rules as rules

# Columns of `rows`.
PARAMETER = tl.constexpr(0)
GRADIENT = tl.constexpr(1)
NUMEL = tl.constexpr(2)
STEP = tl.constexpr(3)  # address of the float32 step
LR = tl.constexpr(4)  # address of the float32 learning rate
FACTOR = tl.constexpr(5)  # address of a float32 factor of this gradient
KEY = tl.constexpr(6)  # of the random bits of the write-back
OFFSET = tl.constexpr(7)  # index of the first element in the whole (unsharded) parameter
EXACT = tl.constexpr(8)  # 1: the moments are float32, not codes
MOMENTS = tl.constexpr(9)  # addresses: codes, scale; codes, scale; codes, scale
UNIT = tl.constexpr(15)  # of a parameter of codes: address of its float32 step, or of its steps
CHANNEL = tl.constexpr(16)  # elements for which one of them holds
COLUMNS = tl.constexpr(17)

# Columns of `scalars` behind the rule's own.
TIME = tl.constexpr(14)
APPLIED = tl.constexpr(15)  # what the gradient is multiplied by; NaN: this step does not happen
WIDTH = tl.constexpr(16)

# How a moment is coded; see `_encode`.
NONE = tl.constexpr(0)
FLOAT32 = tl.constexpr(1)
SIGNED = tl.constexpr(2)  # code books, by tables
UNSIGNED = tl.constexpr(3)
INT8 = tl.constexpr(4)
UINT8_NO_ZERO = tl.constexpr(5)
E4M3 = tl.constexpr(6)
SIGNED4 = tl.constexpr(7)
ULINEAR4 = tl.constexpr(8)
E4M3_NO_UNDERFLOW = tl.constexpr(9)

SMALLEST_SCALE = tl.constexpr(2.0**-126)
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, which then lies in the lowest bits


@triton.jit
def _look_up(table, index):
    # The hint makes the compiler keep the tile's layout for a gather; nothing is read together, since the addresses
    # are multiples of 4 bytes only.
    return tl.load(tl.max_contiguous(table + index, [1, 2]))


@triton.jit
def _encode(y, KIND: tl.constexpr, steps):
    """Codes, uint8, of y = x / scale; see `lowbits.optim.Blockwise`.

    A code book is looked up: the leading 16 (15) bits of y choose an entry, which holds the code of the smallest y
    with these bits, and how far it is to the next code; adding the other bits carries into the code.
    """
    if KIND == SIGNED or KIND == UNSIGNED or KIND == SIGNED4:
        key = y.to(tl.int32, bitcast=True)
        if KIND != UNSIGNED:
            key = key ^ ((key >> 31) & 0x7FFFFFFF)  # in the order of the numbers
        SHIFT: tl.constexpr = 16 if KIND == UNSIGNED else 17
        entry = _look_up(steps, key >> SHIFT)
        code = ((key & ((1 << SHIFT) - 1)) + entry >> SHIFT).to(tl.uint8)
    elif KIND == INT8:
        code = (y * 127.0 + MAGIC).to(tl.int32, bitcast=True).to(tl.uint8)
    elif KIND == UINT8_NO_ZERO:
        code = tl.maximum((y * 255.0 + MAGIC).to(tl.int32, bitcast=True) & 0xFF, 1).to(tl.uint8)
    elif KIND == E4M3:
        code = (y * 448.0).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    elif KIND == E4M3_NO_UNDERFLOW:
        code = (y * 448.0).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        code = tl.where((y > 0) & (code == 0), 1, code).to(tl.uint8)
    else:
        tl.static_assert(KIND == ULINEAR4)
        code = tl.maximum(y * 16.0 - 1.0 + MAGIC, MAGIC).to(tl.int32, bitcast=True).to(tl.uint8)
    return code


@triton.jit
def _fetch(
    address, base, inner, half, left, SIZE: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, ALIGN: tl.constexpr
):
    """What is stored of a moment's tile: float32, codes, or pairs of 4-bit codes. Filled up with zeros."""
    if KIND == FLOAT32:
        at = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), ALIGN) + base
        stored = tl.load(at + inner, _inside(inner, left, SIZE, BLOCK), 0.0)
    else:
        at = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 8 if ALIGN == 16 else 1)
        if KIND == SIGNED4 or KIND == ULINEAR4:
            stored = tl.load(at + base // 2 + half, _pairs(half, left, SIZE, BLOCK), 0x77)
        else:
            zero: tl.constexpr = 127 if KIND == SIGNED else 0
            stored = tl.load(at + base + inner, _inside(inner, left, SIZE, BLOCK), zero)
    return stored


@triton.jit
def _inside(inner, left, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Which elements of a tile exist."""
    mask = inner < left
    if SIZE != BLOCK:
        mask = mask & ((tl.arange(0, BLOCK) < SIZE)[None, :])
    return mask


@triton.jit
def _pairs(half, left, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Which bytes of 4-bit codes exist."""
    mask = half * 2 < left
    if SIZE != BLOCK:
        mask = mask & ((tl.arange(0, BLOCK // 2) < SIZE // 2)[None, :])
    return mask


@triton.jit
def _scale(address, first, live, KIND: tl.constexpr, NB: tl.constexpr):
    if KIND == FLOAT32 or KIND == NONE:
        return tl.zeros([NB], tl.float32)
    return tl.load(address.to(tl.pointer_type(tl.float32)) + first + tl.arange(0, NB), live, 0.0)


@triton.jit
def _decode(stored, scale, points, KIND: tl.constexpr):
    """A moment's tile, float32."""
    if KIND == FLOAT32:
        return stored
    if KIND == SIGNED4 or KIND == ULINEAR4:
        code = tl.interleave(stored & 15, stored >> 4)
    else:
        code = stored
    return _look_up(points, code.to(tl.int32)) * scale[:, None]


@triton.jit
def _store(
    x, address, scales, base, first, inner, half, live, left, steps, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    NB: tl.constexpr, KIND: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    mask = _inside(inner, left, SIZE, BLOCK)
    if KIND == FLOAT32:
        tl.store(tl.multiple_of(address.to(tl.pointer_type(tl.float32)), ALIGN) + base + inner, x, mask)
    else:
        if KIND != SIGNED and KIND != UNSIGNED:  # theirs is 0 already: a short block was filled up with the code of 0
            x = tl.where(mask, x, 0.0)
        # The largest magnitude by its bits, so that NaN counts as the largest.
        bits = x.to(tl.uint32, bitcast=True)
        if KIND != UNSIGNED:
            bits = bits & 0x7FFFFFFF
        amax = tl.max(bits, 1).to(tl.float32, bitcast=True)
        scale = tl.where(amax > 0, tl.maximum(amax, SMALLEST_SCALE), amax)
        reciprocal = tl.where(scale > 0, rules.reciprocal(scale), 0.0)
        tl.store(scales.to(tl.pointer_type(tl.float32)) + first + tl.arange(0, NB), scale, live)
        code = _encode(x * reciprocal[:, None], KIND, steps)
        at = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 8 if ALIGN == 16 else 1)
        if KIND == SIGNED4 or KIND == ULINEAR4:
            low, high = tl.split(tl.where(mask, code, 0).to(tl.uint8).reshape(NB, BLOCK // 2, 2))
            tl.store(at + base // 2 + half, low | (high << 4), _pairs(half, left, SIZE, BLOCK))
        else:
            tl.store(at + base + inner, code, mask)


@triton.jit
def _random16(key, start, t, SIZE: tl.constexpr, NB: tl.constexpr, BLOCK: tl.constexpr):
    """16 random bits an element, as `Noise.bits16`: a counter serves 8 elements."""
    counter = (start >> 3) + tl.arange(0, NB)[:, None] * (SIZE // 8) + tl.arange(0, BLOCK // 8)[None, :]
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    step = tl.zeros_like(low) + t.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, low, high, step, tl.zeros_like(low))
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(NB, BLOCK // 2)
    return tl.interleave(words & 0xFFFF, words >> 16).to(tl.int32)


@triton.jit
def _cut(new, row, h, base, SIZE: tl.constexpr, NB: tl.constexpr, BLOCK: tl.constexpr):
    """Float32 numbers rounded stochastically to bfloat16's; those that are not finite stay."""
    bits = new.to(tl.int32, bitcast=True)
    random = _random16(tl.load(row + KEY), tl.load(row + OFFSET) + base, tl.load(h + TIME), SIZE, NB, BLOCK)
    cut = ((bits + random) & -0x10000).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F800000) != 0x7F800000, cut, new)


@triton.jit
def _weight(
    target, base, inner, left, SIZE: tl.constexpr, BLOCK: tl.constexpr, NB: tl.constexpr, GRID: tl.constexpr
):  # fmt: skip
    """What is stored of a parameter's tile: floats, or bytes of codes."""
    mask = _inside(inner, left, SIZE, BLOCK)
    if GRID == 0:
        stored = tl.load(target + base + inner, mask, 0.0)
    else:
        stored = grids.fetch(target, base, inner, mask, left, SIZE, BLOCK, NB, GRID)
    return stored


@triton.jit
def _values(p, row, element, mask, GRID: tl.constexpr, CHANNELS: tl.constexpr):
    """Codes, their step, and the values of a tile, float32; floats are all three themselves."""
    if GRID == 0:
        value = p.to(tl.float32)
        code, step = value, value
    else:
        unit = tl.load(row + UNIT).to(tl.pointer_type(tl.float32))
        code, step = grids.decode(p, GRID), grids.steps(unit, element, tl.load(row + CHANNEL), mask, CHANNELS)
        value = code.to(tl.float32) * step
    return code, step, value


@triton.jit
def _draw(
    row, h, base, STOCHASTIC: tl.constexpr, SIZE: tl.constexpr, NB: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """What the codes of a tile are rounded with; nothing reads it where they are rounded to nearest."""
    if STOCHASTIC:
        return grids.uniform(tl.load(row + KEY), tl.load(row + OFFSET) + base, tl.load(h + TIME), SIZE, NB, BLOCK)
    else:
        return 0.0


@triton.jit
def _tiles(
    row, h, start, points_a, points_b, points_c, steps_a, steps_b, steps_c, RULE: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr, C: tl.constexpr, P_TYPE: tl.constexpr, G_TYPE: tl.constexpr, STOCHASTIC: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, NB: tl.constexpr, TILES: tl.constexpr, ALIGN: tl.constexpr,
    GRID: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Update TILES tiles of NB blocks of a parameter; what the next tile needs is read before this one is worked on."""
    factor = tl.load(h + APPLIED)
    happens = (factor == factor).to(tl.int64)
    numel = tl.multiple_of(tl.load(row + NUMEL), ALIGN) * happens
    # Codes are read in pieces of 8 bytes at most, which is what divides the addresses of packed ones.
    DIVISOR: tl.constexpr = ALIGN if GRID == 0 else (8 if ALIGN == 16 else 1)
    target = tl.multiple_of(tl.load(row + PARAMETER).to(tl.pointer_type(P_TYPE)), DIVISOR)
    source = tl.multiple_of(tl.load(row + GRADIENT).to(tl.pointer_type(G_TYPE)), ALIGN)
    codes_a, scales_a = tl.load(row + MOMENTS), tl.load(row + MOMENTS + 1)
    codes_b, scales_b = tl.load(row + MOMENTS + 2), tl.load(row + MOMENTS + 3)
    codes_c, scales_c = tl.load(row + MOMENTS + 4), tl.load(row + MOMENTS + 5)
    block = tl.arange(0, NB)
    inner = block[:, None] * SIZE + tl.arange(0, BLOCK)[None, :]
    half = block[:, None] * (SIZE // 2) + tl.arange(0, BLOCK // 2)[None, :]
    base, left = start * SIZE, numel - start * SIZE
    p = _weight(target, base, inner, left, SIZE, BLOCK, NB, GRID)
    g = tl.load(source + base + inner, _inside(inner, left, SIZE, BLOCK), 0.0)
    a, b, c = g, g, g
    if A != NONE:
        a = _fetch(codes_a, base, inner, half, left, SIZE, BLOCK, A, ALIGN)
    if B != NONE:
        b = _fetch(codes_b, base, inner, half, left, SIZE, BLOCK, B, ALIGN)
    if C != NONE:
        c = _fetch(codes_c, base, inner, half, left, SIZE, BLOCK, C, ALIGN)
    live = block * SIZE < left
    scale_a, scale_b = _scale(scales_a, start, live, A, NB), _scale(scales_b, start, live, B, NB)
    scale_c = _scale(scales_c, start, live, C, NB)
    for tile in range(TILES):  # not fewer where the parameter ends: a constant number makes large ones a tenth faster
        first = start + tile * NB
        base, left = first * SIZE, numel - first * SIZE
        live = block * SIZE < left
        q_now, d_now, p_now = _values(p, row, base + inner, _inside(inner, left, SIZE, BLOCK), GRID, CHANNELS)
        g_now = g.to(tl.float32) * factor
        m_a, m_b, m_c = p_now, p_now, p_now
        if A != NONE:
            m_a = _decode(a, scale_a, points_a, A)
        if B != NONE:
            m_b = _decode(b, scale_b, points_b, B)
        if C != NONE:
            m_c = _decode(c, scale_c, points_c, C)
        if TILES > 1:
            coming = first + NB
            after, rest = coming * SIZE, tl.where(tile + 1 < TILES, numel - coming * SIZE, 0)
            p = _weight(target, after, inner, rest, SIZE, BLOCK, NB, GRID)
            g = tl.load(source + after + inner, _inside(inner, rest, SIZE, BLOCK), 0.0)
            if A != NONE:
                a = _fetch(codes_a, after, inner, half, rest, SIZE, BLOCK, A, ALIGN)
            if B != NONE:
                b = _fetch(codes_b, after, inner, half, rest, SIZE, BLOCK, B, ALIGN)
            if C != NONE:
                c = _fetch(codes_c, after, inner, half, rest, SIZE, BLOCK, C, ALIGN)
            follows = block * SIZE < rest
            scale_a, scale_b = _scale(scales_a, coming, follows, A, NB), _scale(scales_b, coming, follows, B, NB)
            scale_c = _scale(scales_c, coming, follows, C, NB)
        new, m_a, m_b, m_c = RULE(p_now, g_now, m_a, m_b, m_c, h)
        if GRID == 0:
            if STOCHASTIC:
                new = _cut(new, row, h, base, SIZE, NB, BLOCK)
            tl.store(target + base + inner, new.to(P_TYPE), _inside(inner, left, SIZE, BLOCK))
        else:
            draw = _draw(row, h, base, STOCHASTIC, SIZE, NB, BLOCK)
            code = grids.moved(q_now, new - p_now, d_now, draw, STOCHASTIC, LOW, HIGH)
            grids.store(code, target, base, inner, _inside(inner, left, SIZE, BLOCK), left, SIZE, BLOCK, NB, GRID)
        if A != NONE:
            _store(m_a, codes_a, scales_a, base, first, inner, half, live, left, steps_a, SIZE, BLOCK, NB, A, ALIGN)
        if B != NONE:
            _store(m_b, codes_b, scales_b, base, first, inner, half, live, left, steps_b, SIZE, BLOCK, NB, B, ALIGN)
        if C != NONE:
            _store(m_c, codes_c, scales_c, base, first, inner, half, live, left, steps_c, SIZE, BLOCK, NB, C, ALIGN)


@triton.jit
def update(
    rows, scalars, chunks, points_a, points_b, points_c, steps_a, steps_b, steps_c, RULE: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, MIXED: tl.constexpr, P_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr, STOCHASTIC: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, NB: tl.constexpr,
    TILES: tl.constexpr, ALIGN: tl.constexpr, GRID: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    CHANNELS: tl.constexpr
):  # fmt: skip
    """Update NB * TILES blocks of SIZE elements (BLOCK: the next power of two) of one parameter, in place.

    A, B, C say how the moments are coded; with MIXED, rows marked EXACT have float32 moments instead. ALIGN divides
    every address and every number of elements. GRID: the parameter's codes in a byte, LOW to HIGH, with a step for
    each of its rows under CHANNELS; 0: it is floats.
    """
    work = tl.load(chunks + tl.program_id(0))
    number, start = work >> 40, work & ((1 << 40) - 1)
    row, h = rows + number * COLUMNS, scalars + number * WIDTH
    exact = False
    if MIXED:
        exact = tl.load(row + EXACT) == 1
    if exact:
        EA: tl.constexpr = NONE if A == NONE else FLOAT32
        EB: tl.constexpr = NONE if B == NONE else FLOAT32
        EC: tl.constexpr = NONE if C == NONE else FLOAT32
        _tiles(
            row, h, start, points_a, points_b, points_c, steps_a, steps_b, steps_c, RULE, EA, EB, EC, P_TYPE, G_TYPE,
            STOCHASTIC, SIZE, BLOCK, NB, TILES, ALIGN, GRID, LOW, HIGH, CHANNELS
        )  # fmt: skip
    else:
        _tiles(
            row, h, start, points_a, points_b, points_c, steps_a, steps_b, steps_c, RULE, A, B, C, P_TYPE, G_TYPE,
            STOCHASTIC, SIZE, BLOCK, NB, TILES, ALIGN, GRID, LOW, HIGH, CHANNELS
        )  # fmt: skip


@triton.jit
def squares(rows, chunks, num_chunks, partial, G_TYPE: tl.constexpr, SPAN: tl.constexpr, ALIGN: tl.constexpr):
    """Sum the squares of all gradients in float64, one partial sum a program.

    Chunks here are `row << 40 | first element / SPAN`.
    """
    total = tl.zeros([SPAN], tl.float64)
    index = tl.program_id(0)
    while index < num_chunks:
        work = tl.load(chunks + index)
        row, base = work >> 40, (work & ((1 << 40) - 1)) * SPAN
        left = tl.multiple_of(tl.load(rows + row * COLUMNS + NUMEL), ALIGN) - base
        source = tl.multiple_of(tl.load(rows + row * COLUMNS + GRADIENT), ALIGN).to(tl.pointer_type(G_TYPE)) + base
        lane = tl.arange(0, SPAN)
        g = tl.load(source + lane, lane < left, 0.0).to(tl.float64)
        total += g * g
        index += tl.num_programs(0)
    tl.store(partial + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def prepare(
    rows, scalars, bases, num_rows, partial, limit, grad_scale, found_inf, CLIP: tl.constexpr, SCALED: tl.constexpr,
    PARTIALS: tl.constexpr, CORRECTIONS: tl.constexpr, FIRST: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Count the step, and work out what its elements have in common: corrections, and the gradient's factor.

    factor = its own factor / grad_scale * limit / max(norm, limit). Where it is not finite, or `found_inf` is set, the
    step does not happen: nothing is counted and `update` leaves everything as it is.
    """
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = row < num_rows
    address = rows + row * COLUMNS
    factor = tl.load(tl.load(address + FACTOR, mask, 0).to(tl.pointer_type(tl.float32)), mask, 1.0).to(tl.float64)
    unscale = 1.0
    if SCALED:
        unscale = 1 / tl.load(grad_scale).to(tl.float64)
        unscale = tl.where(tl.load(found_inf) == 0, unscale, float("nan"))
    if CLIP:
        norm = tl.sqrt(tl.sum(tl.load(partial + tl.arange(0, PARTIALS)), 0)) * unscale
        bound = tl.load(limit)
        # A norm that is not finite makes the factor NaN: bound / inf alone would be a clean 0.
        factor = factor * tl.where(norm < float("inf"), bound / tl.maximum(norm, bound), float("nan"))
    factor = factor * unscale
    factor = factor.to(tl.float32)
    happens = tl.abs(factor) < float("inf")
    factor = tl.where(happens, factor, float("nan"))
    step = tl.load(address + STEP, mask, 0).to(tl.pointer_type(tl.float32))
    t = tl.load(step, mask, 0.0) + tl.where(happens, 1.0, 0.0)
    tl.store(step, t, mask)
    h = scalars + row * WIDTH
    tl.store(h, tl.load(tl.load(address + LR, mask, 0).to(tl.pointer_type(tl.float32)), mask, 0.0), mask)
    for index in tl.static_range(CORRECTIONS):
        base, power = tl.load(bases + row * 2 + index, mask, 0.0), tl.full([TILE], 1.0, tl.float64)
        left = t.to(tl.int32)
        for _ in range(24):  # float32 counts to 2^24
            power = tl.where((left & 1) == 1, power * base, power)
            base, left = base * base, left >> 1
        tl.store(h + FIRST + index, (1 - power).to(tl.float32), mask)
    tl.store(h + TIME, t, mask)
    tl.store(h + APPLIED, factor, mask)
