# SPDX-License-Identifier: Apache-2.0
"""Multiply codes and apply the scales to the sums, as Triton sees it.

    out[m, n] = scale_a[m] scale_b[n] sum_k a[m, k] b[n, k]                                                    (scaled)
    out[m, n] = sum_c scale_a[m, c] scale_b[n, c] sum_{k in c} a[m, k] b[n, k],  128 elements k in c            (blocks)

Integer products are summed in int32, exactly; others in float32. As many programs as the GPU has processors walk over
the tiles of the result, so that one tile's epilogue runs beside the next one's loads.
"""

# Triton reads this file's source: annotations would be evaluated as its own types.

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = triton.knobs.runtime.interpret
INT32 = tl.int32


def descriptor(x, rows, columns):
    """What the hardware's unit for copies needs to know to bring tiles of a matrix."""
    return TensorDescriptor.from_tensor(x, [rows, columns])


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile; GROUP rows of tiles are walked together, so that both operands stay in the cache."""
    group = tile // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    within = tile % (GROUP * tiles_n)
    return group * GROUP + within % height, within // height


@triton.jit
def scaled(
    a, b, out, scale_a, scale_b, M, N, K, EACH_ROW: tl.constexpr, EACH_COLUMN: tl.constexpr, SUMS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr
):  # fmt: skip
    """Descriptors of [M, K] and [N, K]; a scale for EACH_ROW of a or one, for EACH_COLUMN (a row of b) or one."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        at_m, at_n = _place(tile, tiles_m, tiles_n, GROUP)
        sums = tl.zeros((BM, BN), SUMS)
        for k in range(tl.cdiv(K, BK)):
            sums = tl.dot(a.load([at_m * BM, k * BK]), b.load([at_n * BN, k * BK]).T, sums, out_dtype=SUMS)
        row, column = at_m * BM + tl.arange(0, BM), at_n * BN + tl.arange(0, BN)
        of_row = tl.load(scale_a + row, row < M, 0.0) if EACH_ROW else tl.load(scale_a + row * 0)
        of_column = tl.load(scale_b + column, column < N, 0.0) if EACH_COLUMN else tl.load(scale_b + column * 0)
        result = sums.to(tl.float32) * of_row[:, None] * of_column[None, :]
        to = out + row[:, None].to(tl.int64) * N + column[None, :]
        tl.store(to, result.to(out.dtype.element_ty), (row[:, None] < M) & (column[None, :] < N))


@triton.jit
def blocks(
    a, b, out, scale_a, scale_b, M, N, K, TILES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr
):  # fmt: skip
    """Scales [K / 128, M] of a; of b, [N / 128, K / 128] where TILES (BN is 128 then), else [K / 128, N]."""
    tiles_m, tiles_n, chunks = tl.cdiv(M, BM), tl.cdiv(N, BN), tl.cdiv(K, 128)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS):
        at_m, at_n = _place(tile, tiles_m, tiles_n, GROUP)
        row, column = at_m * BM + tl.arange(0, BM), at_n * BN + tl.arange(0, BN)
        sums = tl.zeros((BM, BN), tl.float32)
        for c in range(chunks):
            products = tl.dot(a.load([at_m * BM, c * 128]), b.load([at_n * BN, c * 128]).T, out_dtype=tl.float32)
            of_row = tl.load(scale_a + c * M + row, row < M, 0.0)
            if TILES:
                sums += products * (of_row * tl.load(scale_b + at_n * chunks + c))[:, None]
            else:
                of_column = tl.load(scale_b + c * N + column, column < N, 0.0)
                sums += products * of_row[:, None] * of_column[None, :]
        to = out + row[:, None].to(tl.int64) * N + column[None, :]
        tl.store(to, sums.to(out.dtype.element_ty), (row[:, None] < M) & (column[None, :] < N))
