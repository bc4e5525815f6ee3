# SPDX-License-Identifier: Apache-2.0
"""Quantize a matrix for both GEMMs that contract it: one read for the scales, one for both copies.

A tensor enters two of a layer's three GEMMs, each of which contracts another of its axes, and units want the
contracted axis to lie together in memory. So X [tokens, in] becomes codes [tokens, in] for fprop and codes
[in, tokens] for wgrad, each with the scales of its rows. `lowbits.kernels.rows` does this for the rules that it knows,
and `rows.c` on a CPU to int8; the rest takes the definition, which gives the same bytes.
"""

from __future__ import annotations

import ast
import math
import struct
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbits.formats import FloatFormat, Format, IntFormat
from lowbits.kernels import _rows_on_cpu
from lowbits.kernels._blocks import pack_operand
from lowbits.kernels._coded import ALIGNED, FLOAT8, Coded, as_matrix, of_blocks, why_not_coded
from lowbits.kernels._operators import operator
from lowbits.kernels._units import kernels, launches, on_device
from lowbits.quantizers import Amax, PerTensor, PowerOfTwo, QuantSpec, ReciprocalAmax, Rounding, quantize

_TILE = 64, 128  # rows and columns that a program works on: the fewest instructions an element
_RULES = {Amax: "AMAX", PowerOfTwo: "POWER_OF_TWO", ReciprocalAmax: "RECIPROCAL"}


class _Axis(NamedTuple):
    """What the kernels are compiled for, along one of the axes."""

    of: str
    high: float
    mantissa: int
    lowest: int
    floor: float
    top: float
    rule: str
    dtype: str


_NOTHING = _Axis("NONE", 0.0, 0, 0, 0.0, 0.0, "AMAX", "uint8")


@torch.compiler.assume_constant_result
def _plan_text(along_k: QuantSpec | None, along_r: QuantSpec | None, device: torch.device) -> str | None:
    """What the kernels are compiled for, as an operator can take it; None where they do not cover it."""
    text = _text(along_k, along_r)
    if text is None or launches("rows", device):
        return text
    return text if device.type == "cpu" and _rows_on_cpu.covered(along_k, along_r) else None


_SPECS: dict[str, tuple[QuantSpec | None, QuantSpec | None]] = {}


@cache
def _text(along_k: QuantSpec | None, along_r: QuantSpec | None) -> str | None:
    plan = _axis(along_k), _axis(along_r)
    if plan[0] is None or plan[1] is None:
        return None
    text = repr((tuple(plan[0]), tuple(plan[1])))
    _SPECS[text] = along_k, along_r
    return text


def _axis(spec: QuantSpec | None) -> _Axis | None:
    """How the kernels quantize along an axis; None where they do not."""
    if spec is None:
        return _NOTHING
    rule = _RULES.get(type(spec.scale))
    plain = spec.rounding is Rounding.NEAREST and spec.transform is None
    if rule is None or not plain or not spec.format.has_zero or why_not_coded(spec) is not None:
        return None
    assert isinstance(spec.scale, Amax | PowerOfTwo | ReciprocalAmax)
    floor, top, fmt = _float32(spec.scale.floor), 0.0, spec.format
    if isinstance(spec.scale, ReciprocalAmax):
        if not spec.scale.floor > 0:
            return None
        # The definition compares in float64: the first float32 that is not below.
        floor = floor if floor >= spec.scale.floor else _next_float32(floor)
        top = _float32(fmt.max / spec.scale.floor)
    of = "TENSOR" if isinstance(spec.granularity, PerTensor) else "ROW"
    mantissa, lowest = (fmt.mantissa_bits, fmt.min_normal_exponent) if isinstance(fmt, FloatFormat) else (0, 0)
    return _Axis(of, fmt.max, mantissa, lowest, floor, top, rule, str(_dtype(fmt)).removeprefix("torch."))


def _dtype(fmt: Format) -> torch.dtype:
    return torch.int8 if isinstance(fmt, IntFormat) else FLOAT8[fmt]


def _float32(x: float) -> float:
    return float(struct.unpack("f", struct.pack("f", x))[0])


def _next_float32(x: float) -> float:
    return float(struct.unpack("f", struct.pack("I", struct.unpack("I", struct.pack("f", x))[0] + 1))[0])


def quantize_both(
    x: Tensor, along_k: QuantSpec | None, along_r: QuantSpec | None, noise_k: Tensor | None, noise_r: Tensor | None
) -> tuple[Coded | None, Coded | None]:
    """Quantize a matrix along its columns, and its transpose along its rows.

    Args:
        x: [R, K], floating point, any strides.
        along_k: how a GEMM that contracts K wants x [R, K]; None for not at all.
        along_r: how one that contracts R wants x.T [K, R]; None for not at all.
        noise_k: for stochastic rounding, see `quantize`.
        noise_r: likewise, of the transpose.
    Returns:
        codes [R, K] and codes [K, R], or None where nothing was asked for.
    """
    if any(spec is not None and of_blocks(spec) for spec in (along_k, along_r)):
        first = None if along_k is None else _of_blocks(x, along_k, noise_k)
        return first, None if along_r is None else _of_blocks(x.t(), along_r, noise_r)
    plan = _plan_text(along_k, along_r, x.device)
    few = x.device.type == "cpu" and x.numel() < _rows_on_cpu.SMALLEST and not launches("rows", x.device)
    if plan is None or few or x.numel() == 0 or x.dtype not in (torch.bfloat16, torch.float32):
        first = None if along_k is None else Coded.of(quantize(x, along_k, noise_k))
        return first, None if along_r is None else Coded.of(quantize(x.t(), along_r, noise_r))
    # Through torch's dispatcher where a compiler has to see an operator; it costs as much as the launches.
    run = _quantize_rows_op if torch.compiler.is_compiling() else _launch
    codes_k, scale_k, codes_r, scale_r = run(x, plan)
    first = None if along_k is None else Coded(codes_k, scale_k, along_k, x.shape[1])
    return first, None if along_r is None else Coded(codes_r, scale_r, along_r, x.shape[0])


def _of_blocks(x: Tensor, spec: QuantSpec, noise: Tensor | None) -> Coded:
    """Scales of blocks are known as soon as a block is read: each copy takes one launch."""
    packed = None
    if noise is None and x.shape[1] % ALIGNED == 0:
        packed = pack_operand(x, spec, x, 0)
    if packed is None:
        return Coded.of(quantize(x, spec, noise))
    return Coded(packed.codes.view(_dtype(spec.format)).view(x.shape), as_matrix(packed.scale, spec), spec, x.shape[1])


def _results(x: Tensor, along_k: _Axis, along_r: _Axis) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found: list[Tensor] = []
    for axis, (rows, length) in ((along_k, x.shape), (along_r, x.shape[::-1])):
        used = axis.of != "NONE"
        padded = math.ceil(length / ALIGNED) * ALIGNED
        found.append(x.new_empty((rows, padded) if used else (0,), dtype=getattr(torch, axis.dtype)))
        found.append(x.new_empty((rows if axis.of == "ROW" else 1, 1) if used else (0,), dtype=torch.float32))
    return found[0], found[1], found[2], found[3]


def _launch(x: Tensor, plan_text: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    along_k, along_r = _from_text(plan_text)
    codes_k, scale_k, codes_r, scale_r = results = _results(x, along_k, along_r)
    if not launches("rows", x.device):
        _rows_on_cpu.quantize_rows(x, *_SPECS[plan_text], results)
        return results
    k = kernels("rows")
    assert k is not None
    (rows, columns), (stride_r, stride_k) = x.shape, x.stride()
    amax_k, amax_r = torch.zeros(scale_k.numel() + scale_r.numel(), dtype=torch.int32, device=x.device).split(
        (scale_k.numel(), scale_r.numel())
    )
    br, bk = _TILE
    constants: dict[str, Any] = {"BR": br, "BK": bk, "num_warps": 4, "enable_fp_fusion": False}
    kinds = {"OF_K": along_k.of, "OF_R": along_r.of}
    # Each copy is filled up with zeros along what a GEMM contracts.
    padded_k = codes_k.shape[1] if along_k.of != "NONE" else columns
    padded_r = codes_r.shape[1] if along_r.of != "NONE" else rows
    with on_device(x.device):
        k.amax[-(-columns // bk), -(-rows // br)](
            x, amax_k, amax_r, rows, columns, stride_r, stride_k, **kinds, **constants
        )
        k.quantize[-(-padded_k // bk), -(-padded_r // br)](
            x, amax_k, amax_r, codes_k, scale_k, codes_r, scale_r, rows, columns, padded_k, padded_r, stride_r,
            stride_k, **kinds, **_constants("K", along_k), **_constants("R", along_r), **constants,
        )  # fmt: skip
    return results


@cache
def _constants(name: str, axis: _Axis) -> dict[str, Any]:
    values = {
        "HIGH": axis.high, "M": axis.mantissa, "LOWEST": axis.lowest, "FLOOR": axis.floor,
        "TOP": axis.top, "RULE": axis.rule,
    }  # fmt: skip
    return {f"{key}_{name}": value for key, value in values.items()}


@cache
def _from_text(text: str) -> tuple[_Axis, _Axis]:
    first, second = ast.literal_eval(text)
    return _Axis(*first), _Axis(*second)


# An operator takes no tuples: what was compiled for a plan is found by its text.
def _quantize_rows(x: Tensor, plan_text: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _launch(x, plan_text)


_quantize_rows_op = operator(_quantize_rows, lambda x, plan_text: _results(x, *_from_text(plan_text)))
