# SPDX-License-Identifier: Apache-2.0
"""How fast GEMMs are, M x K x N: bf16, FP8 and int8; ours, torch's, and with `--peers` torchao's and bitsandbytes'.

    python benchmarks/gemm.py --peers
    python benchmarks/gemm.py --peers --backward --sizes 16384x2048x5632    # and the shapes of dgrad and wgrad
    python benchmarks/gemm.py --tune --only int8 --sizes 8192x8192x8192     # tiles of our GEMMs, see gemm_tiles.py

Every operand is [rows, contraction], as our layers have them. Operands are random normal numbers: zeros would run
faster, at a higher clock. `of best`: of the fastest row of that size in this run. `error`: the largest distance from
float64 arithmetic on the same operands, of the sum of the products' magnitudes, on 64 rows; bf16's own rounding of the
result is 2^-9 of the result.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import NamedTuple

import gemm_tiles
import torch
from measuring import FAILURES, Report, Row, copy_gb_per_s, device_ms, first_line, missing, number, parser, sizes
from torch import Tensor

from lowbits.formats import E4M3, INT8
from lowbits.kernels import Coded, Decoded, quantize_both, scaled_mm
from lowbits.quantizers import PerGroup, PerRow, PerTensor, PerTile, PowerOfTwo, QuantSpec, ReciprocalAmax
from lowbits.recipes import named

CUDA_SIZES = ("16384x2048x5632", "16384x4096x14336", "8192x8192x8192")
CPU_SIZES = ("512x768x3072", "512x3072x768", "1024x1024x1024")
INT8_ROW, FP8_ROW = QuantSpec(INT8, PerRow()), QuantSpec(E4M3, PerRow(), ReciprocalAmax())
FP8_TENSOR = QuantSpec(E4M3, PerTensor(), ReciprocalAmax())
FP8_GROUP, FP8_TILE = QuantSpec(E4M3, PerGroup(128), PowerOfTwo()), QuantSpec(E4M3, PerTile(128, 128), PowerOfTwo())


class Gemm(NamedTuple):
    """A GEMM, and its operands as numbers (scales apart) if it is measured against float64."""

    work: Callable[[], Tensor]
    exact: tuple[Tensor, Tensor] | None = None


Make = Callable[[Tensor, Tensor], Gemm]


def coded(x: Tensor, spec: QuantSpec) -> Coded:
    made = quantize_both(x, spec, None, None, None)[0]
    assert made is not None
    return made


def ours(spec: QuantSpec, of_w: QuantSpec | None = None) -> Make:
    """`lowbits.kernels.scaled_mm` on codes."""

    def make(x: Tensor, w: Tensor) -> Gemm:
        a, b = coded(x, spec), coded(w, of_w or spec)
        return Gemm(lambda: scaled_mm(a, b, torch.bfloat16), (a.dequantize(), b.dequantize()))

    return make


def bf16(x: Tensor, w: Tensor) -> Gemm:
    return Gemm(lambda: x @ w.t(), (x, w))


def float32_output(x: Tensor, w: Tensor) -> Gemm:
    return Gemm(lambda: torch.mm(x, w.t(), out_dtype=torch.float32), (x, w))


def emulated(x: Tensor, w: Tensor, compiled: bool) -> Gemm:
    """What the emulation of NVFP4 multiplies: bfloat16 operands, a scale of each on float32 sums."""
    scale, recipe = torch.full((1, 1), 0.5, device=x.device), named("nvfp4")
    assert recipe.fprop.lhs is not None
    a, b = (Decoded(t, scale, recipe.fprop.lhs) for t in (x, w))
    run = torch.compile(scaled_mm, dynamic=False) if compiled else scaled_mm
    return Gemm(lambda: run(a, b, torch.bfloat16), (x * 0.5, w * 0.5))


def fp8_torch(x: Tensor, w: Tensor, spec: QuantSpec, fast: bool) -> Gemm:
    a, b = coded(x, spec), coded(w, spec)

    def work() -> Tensor:
        return torch._scaled_mm(
            a.codes, b.codes.t(), a.scale, b.scale.t(), out_dtype=torch.bfloat16, use_fast_accum=fast
        )

    return Gemm(work, (a.dequantize(), b.dequantize()))


def blocks(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Codes in blocks of `rows` x 128, and their scales [R / rows, K / 128]."""
    r, k = x.shape
    tiles = x.float().view(r // rows, rows, k // 128, 128)
    scale = tiles.abs().amax((1, 3), keepdim=True) / 448
    return (tiles / scale).view(r, k).to(torch.float8_e4m3fn), scale.view(r // rows, k // 128)


def fp8_blocks(x: Tensor, w: Tensor, rows: int) -> Gemm:
    """torch's GEMM under scales of 1x128, and 1x128 or 128x128."""
    (a, scale_a), (b, scale_b) = blocks(x, 1), blocks(w, rows)
    outer_a = scale_a.t().contiguous().t()  # 1x128: down the columns
    outer_b = scale_b if rows > 1 else scale_b.t().contiguous().t()

    def work() -> Tensor:
        return torch._scaled_mm(a, b.t(), outer_a, outer_b.t(), out_dtype=torch.bfloat16)

    wide = [s.repeat_interleave(128, 1).repeat_interleave(n, 0) for s, n in ((scale_a, 1), (scale_b, rows))]
    return Gemm(work, (a.float() * wide[0], b.float() * wide[1]))


def int_mm(x: Tensor, w: Tensor) -> Gemm:
    a, b = coded(x, INT8_ROW), coded(w, INT8_ROW)
    return Gemm(lambda: torch._int_mm(a.codes, b.codes.t()))


def torchao_int8(x: Tensor, w: Tensor) -> Gemm:
    from torchao.prototype.quantized_training.int8_mm import scaled_int8_mm

    a, b = coded(x, INT8_ROW), coded(w, INT8_ROW)
    scale_a, scale_b = a.scale.bfloat16(), b.scale.bfloat16()  # their dtype is the result's
    exact = a.codes.double() * scale_a.double(), b.codes.double() * scale_b.double()
    return Gemm(lambda: scaled_int8_mm(a.codes, b.codes.t(), scale_a, scale_b), exact)


def torchao_blocks(x: Tensor, w: Tensor) -> Gemm:
    from torchao.prototype.blockwise_fp8_training import kernels as theirs

    a, scale_a = theirs.triton_fp8_blockwise_act_quant_lhs(x)
    b, scale_b = theirs.triton_fp8_blockwise_weight_quant_transposed_rhs(w)
    return Gemm(lambda: theirs.triton_fp8_gemm_1x128_128x128(a, b, scale_a, scale_b, out_dtype=torch.bfloat16))


def bitsandbytes_int8(x: Tensor, w: Tensor) -> Gemm:
    from bitsandbytes.functional import int8_linear_matmul

    a, b = coded(x, INT8_ROW), coded(w, INT8_ROW)
    return Gemm(lambda: int8_linear_matmul(a.codes, b.codes))


ARMS: dict[str, Make] = {
    "bf16 torch": bf16,
    "bf16, one scale each, as emulation multiplies": functools.partial(emulated, compiled=False),
    "int8 row, lowbits": ours(INT8_ROW),
    "int8 torch._int_mm, int32 output, no scales": int_mm,
}
CUDA_ARMS: dict[str, Make] = {
    "bf16 torch, float32 output": float32_output,
    "bf16, one scale each, as emulation multiplies, compiled": functools.partial(emulated, compiled=True),
    "fp8 tensor, torch, fast accumulation": functools.partial(fp8_torch, spec=FP8_TENSOR, fast=True),
    "fp8 tensor, torch, full accumulation": functools.partial(fp8_torch, spec=FP8_TENSOR, fast=False),
    "fp8 row, torch, fast accumulation": functools.partial(fp8_torch, spec=FP8_ROW, fast=True),
    "fp8 row, torch, full accumulation": functools.partial(fp8_torch, spec=FP8_ROW, fast=False),
    "fp8 tensor, lowbits": ours(FP8_TENSOR),
    "fp8 row, lowbits": ours(FP8_ROW),
    "fp8 1x128 by 128x128, lowbits": ours(FP8_GROUP, FP8_TILE),
    "fp8 1x128 by 1x128, lowbits": ours(FP8_GROUP),
    "fp8 1x128 by 128x128, torch": functools.partial(fp8_blocks, rows=128),
    "fp8 1x128 by 1x128, torch": functools.partial(fp8_blocks, rows=1),
}
PEERS: dict[str, tuple[str, Make]] = {
    "int8 row, torchao scaled_int8_mm": ("torchao", torchao_int8),
    "fp8 1x128 by 128x128, torchao": ("torchao", torchao_blocks),
    "int8 bitsandbytes, int32 output, no scales": ("bitsandbytes", bitsandbytes_int8),
}


def error(y: Tensor, exact: tuple[Tensor, Tensor]) -> float:
    """The largest distance from float64 on 64 rows, over the sum of the products' magnitudes."""
    rows = torch.linspace(0, y.shape[0] - 1, 64, device=y.device).long()
    a, b = exact[0][rows].double(), exact[1].double()
    return float(((y[rows].double() - a @ b.t()).abs() / (a.abs() @ b.abs().t())).max())


def measure(make: Make, size: tuple[int, ...], device: torch.device, repeat: int | None) -> Row:
    m, k, n = size
    torch.manual_seed(0)
    x, w = (torch.randn(rows, k, device=device, dtype=torch.bfloat16) for rows in (m, n))
    gemm = make(x, w)
    row: Row = {"size": "x".join(map(str, size))}
    row["error"] = None if gemm.exact is None else error(gemm.work(), gemm.exact)
    gemm = Gemm(gemm.work)  # what is exact is large
    row["ms"] = device_ms(gemm.work, device, repeat)
    return row | {"tflops": 2 * m * k * n / row["ms"] / 1e9}


def backward(size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The GEMMs of dgrad and wgrad of a layer whose fprop is of this size."""
    m, k, n = size
    return [(m, n, k), (n, m, k)]


def table(options: argparse.Namespace, device: torch.device) -> int:
    arms: dict[str, tuple[Make, bool]] = {name: (make, False) for name, make in ARMS.items()}
    if device.type == "cuda":
        arms |= {name: (make, False) for name, make in CUDA_ARMS.items()}
    if options.peers:
        absent = {package for package in {package for package, _ in PEERS.values()} if missing(package)}
        arms |= {name: (make, True) for name, (package, make) in PEERS.items() if package not in absent}
    columns = {
        "ms": number("ms", ".3f"), "TFLOP/s": number("tflops", ".4g"), "of best": number("of_best", ".0%"),
        "over bf16": number("over_bf16"), "error": number("error", ".1e"),
    }  # fmt: skip
    report = Report("gemm", device, options, {"copy_gb_per_s": copy_gb_per_s(device)}, columns)
    asked = sizes(options.sizes, 3)
    asked += [other for size in asked if options.backward for other in backward(size)]
    for size in asked:
        rows = {}
        for name, (make, peer) in arms.items():
            if not report.wants(key := f"{'x'.join(map(str, size))} {name}") and name != "bf16 torch":
                continue
            task = functools.partial(measure, make, size, device, options.repeat)
            found = report.measure(key, task, may_fail=peer or "torch" in name)
            if found is not None:
                rows[key] = found
        best = max(row["tflops"] for row in rows.values())
        base = next((row["ms"] for key, row in rows.items() if key.endswith(" bf16 torch")), None)
        for key, row in rows.items():
            report.store(key, row | {"of_best": row["tflops"] / best, "over_bf16": base and base / row["ms"]})
    return report.show("GEMMs, M x K x N")


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--sizes", nargs="+", metavar="MxKxN", help="of the GEMMs")
    made.add_argument("--backward", action="store_true", help="the GEMMs of dgrad and wgrad of each size, too")
    gemm_tiles.add_options(made)
    options = made.parse_args()
    device = torch.device(options.device)
    options.sizes = options.sizes or (CUDA_SIZES if device.type == "cuda" else CPU_SIZES)
    return gemm_tiles.table(options, device) if options.tune else table(options, device)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except FAILURES as failure:
        raise SystemExit(first_line(failure)) from failure
