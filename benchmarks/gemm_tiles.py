# SPDX-License-Identifier: Apache-2.0
"""Which share of the result should a program of our GEMMs compute at a time? For `gemm.py --tune`.

`lowbits.kernels.gemm` on int8 and bfloat16 with a scale a row, and on FP8 with scales of 128 elements, in the tiles
below and at every size that is asked for. A kernel is compiled once for all sizes. Tiles that do not fit fail.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any, NamedTuple

import torch
from measuring import Report, Row, device_ms, number, sizes
from torch import Tensor

from lowbits.kernels import _matmul as matmul
from lowbits.kernels._units import kernels, multiprocessors

# Rows, columns, bytes of terms, warps, stages: what fits into the registers and shared memory of a Hopper processor.
TILES = (
    (128, 256, 128, 8, 3), (128, 256, 128, 8, 4), (256, 128, 128, 8, 3), (128, 128, 128, 8, 4), (128, 128, 128, 4, 4),
    (128, 128, 128, 8, 6), (128, 256, 64, 8, 6), (128, 256, 64, 8, 8), (256, 128, 64, 8, 6), (128, 128, 256, 8, 3),
    (128, 256, 256, 8, 2), (64, 256, 128, 4, 4), (256, 64, 128, 8, 4), (128, 64, 128, 4, 6),
)  # fmt: skip
# A second set of sums takes registers; a tile of scales is 128 columns wide.
TILED = (
    (128, 128, 128, 8, 3), (128, 128, 128, 8, 4), (128, 128, 128, 8, 5), (128, 128, 128, 4, 4), (64, 128, 128, 4, 4),
    (64, 128, 128, 4, 6), (256, 128, 128, 8, 3), (128, 128, 128, 8, 6),
)  # fmt: skip
GROUPED = (*TILED, (128, 256, 128, 8, 3), (128, 64, 128, 4, 6), (64, 256, 128, 4, 4))


class Kind(NamedTuple):
    """What is multiplied: type of the codes, tiles to try, rows that share a scale of the right operand, 0 for none."""

    dtype: torch.dtype
    tiles: tuple[tuple[int, ...], ...]
    rows: int = 0


KINDS = {
    "int8": Kind(torch.int8, TILES),
    "bfloat16": Kind(torch.bfloat16, TILES),
    "fp8 1x128 by 128x128": Kind(torch.float8_e4m3fn, TILED, 128),
    "fp8 1x128 by 1x128": Kind(torch.float8_e4m3fn, GROUPED, 1),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what this table takes."""
    group = parser.add_argument_group("--tune")
    group.add_argument("--tune", action="store_true", help="time tiles of our GEMMs instead")
    group.add_argument("--tiles", nargs="+", type=tile_of, metavar="TILE", help="such as 128x256x128x8x4")
    group.add_argument("--group", type=int, default=8, help="rows of tiles that are walked together")


def tile_of(text: str) -> matmul._Tile:
    try:
        return matmul._Tile(*(int(n) for n in text.split("x")))
    except (TypeError, ValueError):
        message = f"a tile is rows x columns x terms x warps x stages, such as 128x256x128x8x4, got {text}"
        raise argparse.ArgumentTypeError(message) from None


def tiles(kind: Kind) -> list[matmul._Tile]:
    """Tiles worth trying."""
    size = kind.dtype.itemsize
    return [matmul._Tile(rows, columns, held // size, *rest) for rows, columns, held, *rest in kind.tiles]


class Operands(NamedTuple):
    """Codes [M, K] and [N, K], their scales, and where the result goes."""

    a: Tensor
    b: Tensor
    scale_a: Tensor
    scale_b: Tensor
    out: Tensor


def operands(kind: Kind, size: tuple[int, ...], device: torch.device) -> Operands:
    m, k, n = size
    torch.manual_seed(0)
    a, b = (torch.randn(rows, k, device=device, dtype=torch.bfloat16) for rows in (m, n))
    if kind.dtype == torch.int8:
        a, b = ((t * 30).round().clamp(-127, 127) for t in (a, b))
    along = -(-k // 128) if kind.rows else 1
    scales = [torch.ones(rows, along, device=device) for rows in (m, -(-n // max(kind.rows, 1)))]
    out = torch.empty(m, n, device=device, dtype=torch.bfloat16)
    return Operands(a.to(kind.dtype), b.to(kind.dtype), scales[0], scales[1], out)


def launch(of: Operands, kind: Kind, tile: matmul._Tile, group: int) -> None:
    """`lowbits.kernels.gemm` with a tile of our choice."""
    k: Any = kernels("gemm")
    (m, terms), n = of.a.shape, of.b.shape[0]
    programs = 4 if k.INTERPRETED else multiprocessors(of.a.device)
    arguments = (k.descriptor(of.a, tile.rows, tile.terms), k.descriptor(of.b, tile.columns, tile.terms), of.out,
                 of.scale_a, of.scale_b, m, n, terms)  # fmt: skip
    common = {"BM": tile.rows, "BN": tile.columns, "GROUP": group, "PROGRAMS": programs, "num_warps": tile.warps,
              "num_stages": tile.stages}  # fmt: skip
    if kind.rows:
        k.blocks[(programs,)](*arguments, TILES=kind.rows > 1, **common)
    else:
        sums = k.INT32 if kind.dtype == torch.int8 else k.tl.float32
        k.scaled[(programs,)](*arguments, EACH_ROW=True, EACH_COLUMN=True, SUMS=sums, BK=tile.terms, **common)


def measure(
    kind: Kind, tile: matmul._Tile, size: tuple[int, ...], options: argparse.Namespace, device: torch.device
) -> Row:
    of = operands(kind, size, device)
    ms = device_ms(lambda: launch(of, kind, tile, options.group), device, options.repeat)
    m, k, n = size
    return {"ms": ms, "tflops": 2 * m * k * n / ms / 1e9, "tile": list(tile), "size": "x".join(map(str, size))}


def table(options: argparse.Namespace, device: torch.device) -> int:
    """Time every tile at every size, and name the best."""
    k: Any = kernels("gemm")
    if k is None or (device.type == "cpu" and not k.INTERPRETED):
        print("--tune times Triton's kernels, which need CUDA")
        return 1
    columns = {"ms": number("ms", ".3f"), "TFLOP/s": number("tflops", ".4g")}
    report = Report("gemm_tiles", device, options, {}, columns)
    asked = sizes(options.sizes, 3)
    for name, kind in KINDS.items():
        for tile in options.tiles or tiles(kind):
            for size in asked:
                key = f"{'x'.join(map(str, size))} {name}, {'x'.join(map(str, tile))} group {options.group}"
                if report.wants(key):
                    report.measure(key, functools.partial(measure, kind, tile, size, options, device), may_fail=True)
    for size in ("x".join(map(str, size)) for size in asked):
        for name in KINDS:
            rows = [r for key, r in report.rows.items() if key.startswith(f"{size} {name},") and "ms" in r]
            for row in sorted(rows, key=lambda r: r["ms"])[:3]:
                print(f"best of {size} {name}: {row['tile']} {row['tflops']:.0f} TFLOP/s")
    return 0
