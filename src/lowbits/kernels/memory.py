# SPDX-License-Identifier: Apache-2.0
"""Codes of a stretch of memory, one scale for every SIZE elements of it, and back, as Triton sees it.

`lowbits.quantizers` is the definition, with `PerBlock(SIZE)`; each operation is rounded once (the kernels are compiled
without contraction). One launch each way: a program finds the magnitudes of its groups in what it has read.

    x, y        N elements, contiguous
    codes       N int8; -128 is an infinity below zero, as masks have it
    scale       float32, one a group
"""

# Triton reads this file's source: annotations would be evaluated as its own types.

import triton
import triton.language as tl

from lowbits.kernels.rows import _bits, _codes, _scales, _store_decoded


@triton.jit
def _places(N, SIZE: tl.constexpr, GROUPS: tl.constexpr):
    """The groups of a program, their elements' places, and which of them there are."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    return group, at, at < N


@triton.jit
def quantize(
    x, codes, scale, N, HIGH: tl.constexpr, M: tl.constexpr, LOWEST: tl.constexpr, FLOOR: tl.constexpr,
    TOP: tl.constexpr, RULE: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    group, at, inside = _places(N, SIZE, GROUPS)
    v = tl.load(x + at, inside, 0.0).to(tl.float32)
    infinite = v == float("-inf")
    v = tl.where(infinite, 0.0, v)
    of_group, by = _scales(tl.max(_bits(v), 1), HIGH, FLOOR, TOP, RULE)
    code = _codes(v, by[:, None], HIGH, M, LOWEST, RULE, codes.dtype.element_ty)
    tl.store(codes + at, tl.where(infinite, -128, code).to(tl.int8), inside)
    tl.store(scale + group, of_group, group * SIZE < N)


@triton.jit
def decode(codes, scale, y, N, SIZE: tl.constexpr, GROUPS: tl.constexpr):
    group, at, inside = _places(N, SIZE, GROUPS)
    by = tl.load(scale + group, group * SIZE < N, 0.0)
    code = tl.load(codes + at, inside, 0)
    _store_decoded(y + at, tl.where(code == -128, float("-inf"), code.to(tl.float32) * by[:, None]), inside)
