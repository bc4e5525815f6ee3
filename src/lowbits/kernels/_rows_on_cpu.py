# SPDX-License-Identifier: Apache-2.0
"""Quantize a matrix to int8 along both of its axes on a CPU, by compiled C; see `rows.c`.

The definition takes seven passes over float32 for each copy, which costs more than an integer GEMM saves.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from lowbits.formats import IntFormat
from lowbits.kernels._c_compiler import library
from lowbits.quantizers import PerTensor, QuantSpec

SMALLEST = 1 << 16
"""Elements below which the definition is as fast, and not worth the half second of a compiler."""


def covered(*specs: QuantSpec | None) -> bool:
    """Return whether `rows.c` makes such copies and there is a compiler.

    Args:
        specs: which the kernels for GPUs know; None for no copy.
    """
    return all(spec is None or isinstance(spec.format, IntFormat) for spec in specs) and _functions() is not None


def quantize_rows(
    x: Tensor, along_k: QuantSpec | None, along_r: QuantSpec | None, results: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    """Write codes and scales of both copies.

    Args:
        x: [R, K], bfloat16 or float32.
        along_k: as in `quantize_both`.
        along_r: likewise.
        results: codes [R, K] and scales, codes [K, R] and scales, as `Coded` has them; empty where there is no copy.
    """
    if x.stride(1) != 1 and x.stride(0) == 1:  # X.T lies in rows, and its copies are those of X the other way round
        quantize_rows(x.t(), along_r, along_k, (*results[2:], *results[:2]))
        return
    functions, x = _functions(), x if x.stride(1) == 1 else x.contiguous()
    assert functions is not None
    (rows, columns), threads = x.shape, torch.get_num_threads()
    of_rows = torch.empty(-(-columns // 512), rows, dtype=torch.int32)  # of 512 columns each
    of_columns = torch.empty(columns, dtype=torch.int32)
    where = x.data_ptr(), int(x.dtype == torch.bfloat16), rows, columns, x.stride(0)
    functions.amax(*map(ctypes.c_int64, (*where, of_rows.data_ptr(), of_columns.data_ptr(), threads)))
    words, multiplies, held = list(where), [], []
    for spec, bits, codes, scale in zip(
        (along_k, along_r), (of_rows.amax(0), of_columns), results[::2], results[1::2], strict=True
    ):
        if spec is None:
            words += [0, 0, 0]
            multiplies.append(0)
            continue
        whole = bits.amax(0, keepdim=True) if isinstance(spec.granularity, PerTensor) else bits
        # The largest magnitudes have the scales of what they are the largest of.
        made = spec.scale(whole.view(torch.float32).view(-1, 1), (-1,), spec.format)
        scale.copy_(made.scale)
        by = (made.scale if made.encode is None else made.encode).view(-1).expand(bits.numel()).contiguous()
        codes.zero_()  # what fills it up
        words += [by.data_ptr(), codes.data_ptr(), codes.shape[1]]
        multiplies.append(int(made.encode is not None))
        held.append(by)
    functions.quantize(*map(ctypes.c_int64, (*words, *multiplies, threads)))


def scaled(sums: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return sums[m, n] scale_a[m] scale_b[n] in one pass; None where nothing compiled does it.

    Args:
        sums: int32 [M, N], rows lying together.
        scale_a: float32 [M, 1] or [1, 1].
        scale_b: float32 [N, 1] or [1, 1].
        dtype: of the result.
    """
    compiles = torch.compiler.is_compiling() or sums.numel() < SMALLEST or sums.device.type != "cpu"
    if compiles or dtype not in (torch.bfloat16, torch.float32) or (functions := _functions()) is None:
        return None
    rows, columns = sums.shape
    out = torch.empty(rows, columns, dtype=dtype)
    words = (
        sums.data_ptr(), scale_a.data_ptr(), int(scale_a.numel() > 1), scale_b.data_ptr(), int(scale_b.numel() > 1),
        out.data_ptr(), int(dtype == torch.bfloat16), rows, columns, sums.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    functions.scale(*map(ctypes.c_int64, words))
    return out


@cache
def _functions() -> ctypes.CDLL | None:
    return library(files("lowbits.kernels").joinpath("rows.c").read_text(encoding="utf-8"))
