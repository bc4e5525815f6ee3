# SPDX-License-Identifier: Apache-2.0
"""Multiply codes and scale the sums: `lowbits.kernels.gemm` on a GPU; integers by oneDNN on a CPU.

FP8 with scales of 128 elements goes through cuBLAS where torch has that, in whole blocks: 1.3 to 2.3 times as fast
(`benchmarks/gemm.py`), with the same distance from float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowbits.kernels import _rows_on_cpu
from lowbits.kernels._launch import launch
from lowbits.kernels._operators import as_dtype, operator
from lowbits.kernels._units import kernels, launches, multiprocessors, torch_has_block_scales


class _Tile(NamedTuple):
    """The share of the result that a program computes at a time, and how."""

    rows: int
    columns: int
    terms: int
    warps: int
    stages: int


_LARGE, _SMALL, _INTERPRETED = _Tile(128, 256, 128, 8, 4), _Tile(128, 128, 128, 8, 4), _Tile(32, 32, 32, 4, 1)
_BLOCKS = _Tile(128, 128, 128, 8, 4)  # a tile of scales of b is as wide
_GROUP = 8  # rows of tiles that are walked together


def matmul_codes(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scale_a[m] scale_b[n] sum_k a[m, k] b[n, k]; the sums are exact, and each scale rounds once, in float32.

    Args:
        a: int8 [M, K], contiguous, K a multiple of 16.
        b: int8 [N, K], likewise.
        scale_a: float32 [M, 1] or [1, 1].
        scale_b: float32 [N, 1] or [1, 1].
        dtype: of the result [M, N].
    """
    if not launches("gemm", a.device):
        rows = pad(b, (0, 0, 0, -b.shape[0] % 8)) if b.shape[0] % 8 else b  # CPUs without VNNI take multiples of 8
        sums = torch.ops.aten._int_mm(a, rows.t())[:, : b.shape[0]]
        known = _rows_on_cpu.scaled(sums, scale_a, scale_b, dtype)
        return as_dtype(sums.float() * scale_a * scale_b.t(), dtype) if known is None else known
    # Through torch's dispatcher where a compiler has to see an operator; it costs as much as the launch.
    run = _matmul_codes_op if torch.compiler.is_compiling() else _launch
    return run(a, b, scale_a, scale_b, dtype)


def matmul_blocks(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return sum_c scale_a[m, c] scale_b[n, c] sum_{k in c} a[m, k] b[n, k] with 128 elements k in a block c.

    Args:
        a: FP8 [M, K], contiguous, K a multiple of 16.
        b: FP8 [N, K], likewise.
        scale_a: float32 [M, K / 128], rounded up.
        scale_b: float32 [N, K / 128] or [N / 128, K / 128], likewise; of one row for a small b, read as tiles.
        dtype: of the result [M, N].
    """
    run = _matmul_blocks_op if torch.compiler.is_compiling() else _launch_blocks
    return run(a, b, scale_a, scale_b, dtype)


def matmul_fp8(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, fast: bool) -> Tensor:
    """Return scale_a[m] scale_b[n] sum_k a[m, k] b[n, k] in bfloat16, by torch.

    It takes N in multiples of 16 and scales of rows, or of the whole tensor, on both sides.

    Args:
        a: FP8 [M, K], contiguous, K a multiple of 16.
        b: FP8 [N, K], likewise.
        scale_a: float32 [M, 1] or [1, 1].
        scale_b: float32 [N, 1] or [1, 1].
        fast: whether sums may be kept in fewer bits than float32.
    """
    n = b.shape[0]
    if scale_a.numel() != 1 or scale_b.numel() != 1:
        scale_a, scale_b = scale_a.expand(a.shape[0], 1).contiguous(), scale_b.expand(n, 1).contiguous()
    if n % 16:  # padding by nothing would copy
        b = pad(b.view(torch.uint8), (0, 0, 0, -n % 16)).view(b.dtype)
        scale_b = scale_b if scale_b.numel() == 1 else pad(scale_b, (0, 0, 0, -n % 16))
    y = torch.ops.aten._scaled_mm(
        a, b.t(), scale_a=scale_a, scale_b=scale_b.t(), out_dtype=torch.bfloat16, use_fast_accum=fast
    )
    return y[:, :n] if n % 16 else y


def _launch(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    k = kernels("gemm")
    assert k is not None
    (m, terms), n = a.shape, b.shape[0]
    out = a.new_empty(m, n, dtype=dtype)
    programs = 4 if k.INTERPRETED else multiprocessors(a.device)
    tile = _INTERPRETED if k.INTERPRETED else _tile(m, n, programs, dtype)
    each = scale_a.numel() > 1, scale_b.numel() > 1
    constants = {"EACH_ROW": each[0], "EACH_COLUMN": each[1], "SUMS": k.INT32, "BK": tile.terms}
    arguments = k.descriptor(a, tile.rows, tile.terms), k.descriptor(b, tile.columns, tile.terms), out, scale_a, scale_b
    _walk(k.scaled, tile, programs, (*arguments, m, n, terms), constants, a.device)
    return out


def _walk(
    kernel: Any, tile: _Tile, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any], device: torch.device
) -> None:
    def named() -> dict[str, Any]:
        shape = {"BM": tile.rows, "BN": tile.columns, "GROUP": _GROUP, "PROGRAMS": programs}
        return constants | shape | {"num_warps": tile.warps, "num_stages": tile.stages}

    launch(kernel, (programs, 1, 1), arguments, named, (tile, *constants.values()), device)


def _tile(m: int, n: int, programs: int, dtype: torch.dtype) -> _Tile:
    """The large tile reads less for each product; the small one leaves fewer processors idle in small GEMMs.

    Results of 4 bytes on their way out do not fit beside a large tile's operands.
    """
    tiles = -(-m // _LARGE.rows) * -(-n // _LARGE.columns)
    return _LARGE if tiles >= programs and dtype.itemsize <= 2 else _SMALL


def _launch_blocks(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    (m, terms), n = a.shape, b.shape[0]
    tiles = scale_b.shape[0] != n or n == 1
    whole = terms % 512 == 0 and n % 128 == 0 and m % 128 == 0  # cuBLAS wants scales in fours
    # Scales of one block lie together, see `quantize_both`: this copies only those of the definition.
    down_a, down_b = scale_a.t().contiguous(), scale_b.contiguous() if tiles else scale_b.t().contiguous()
    if whole and dtype == torch.bfloat16 and torch_has_block_scales(a.device):
        columns = down_b.t() if tiles else down_b
        return torch.ops.aten._scaled_mm(a, b.t(), down_a.t(), columns, out_dtype=dtype)
    k = kernels("gemm")
    assert k is not None
    out = a.new_empty(m, n, dtype=dtype)
    programs = 4 if k.INTERPRETED else multiprocessors(a.device)
    tile = _Tile(32, 128, 128, 4, 1) if k.INTERPRETED else _BLOCKS
    arguments = k.descriptor(a, tile.rows, tile.terms), k.descriptor(b, tile.columns, tile.terms), out, down_a, down_b
    _walk(k.blocks, tile, programs, (*arguments, m, n, terms), {"TILES": tiles}, a.device)
    return out


def _matmul_codes(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    return _launch(a, b, scale_a, scale_b, dtype)


def _matmul_blocks(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    return _launch_blocks(a, b, scale_a, scale_b, dtype)


def _product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


_matmul_codes_op, _matmul_blocks_op = operator(_matmul_codes, _product), operator(_matmul_blocks, _product)
