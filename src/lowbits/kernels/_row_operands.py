# SPDX-License-Identifier: Apache-2.0
"""Quantize the operands of a simulated GEMM on a GPU in two launches, decode what was stored in one; see
`lowbits.kernels.rows`.

Covered: what `quantize_both` knows, to nearest under one scale a row or one of the whole; and the same under one scale
a column or a group, which are the rows of another view. The eager definition computes the same bits in some twenty
passes over float32. Compiled graphs keep the definition: inductor fuses its passes with each other, with what makes x
and with the cast that a GEMM wants, which it could not do with an operator.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowbits.kernels._decoded import Decoded
from lowbits.kernels._launch import launch
from lowbits.kernels._operators import remembered
from lowbits.kernels._rows import launch_amax, made_of, tile_for
from lowbits.kernels._units import kernels, launches
from lowbits.quantizers import PackedTensor, PerColumn, PerGroup, PerRow, PerTensor, QuantSpec, ReciprocalAmax

_MOST_ROWS = 65535 * 64  # what a grid's second axis holds of tiles of 64 rows


class _Plan(NamedTuple):
    """What the kernels are compiled for, see there.

    Args:
        of: what shares a scale, ROW or TENSOR, of the matrix that `_as_rows` returns.
        scaled: whether the scales are in the operand; others are applied to a GEMM's sums (`QTensor.factors`).
    """

    of: str
    high: float
    mantissa: int
    lowest: int
    floor: float
    top: float
    rule: str
    scaled: bool


@remembered
def _plan(spec: QuantSpec) -> _Plan | None:
    whole = isinstance(spec.granularity, PerTensor)
    made = made_of(replace(spec, granularity=PerTensor() if whole else PerRow()), None)
    if made is None or not isinstance(spec.granularity, PerTensor | PerRow | PerColumn | PerGroup):
        return None
    outside = isinstance(spec.scale, ReciprocalAmax) and isinstance(spec.granularity, PerTensor | PerRow)
    return _Plan._make((made[0].of, *made[0].constants.values(), not outside))


def _plan_for(spec: QuantSpec, shape: tuple[int, ...], device: torch.device) -> _Plan | None:
    if torch.compiler.is_compiling() or len(shape) != 2 or 0 in shape or not launches("rows", device):
        return None
    if isinstance(spec.granularity, PerGroup) and shape[1] % spec.granularity.size:
        return None
    rows = shape[0] if isinstance(spec.granularity, PerTensor) else math.prod(_scale_shape(spec, shape))
    return _plan(spec) if rows <= _MOST_ROWS else None


def _as_rows(x: Tensor, spec: QuantSpec) -> Tensor:
    """A matrix as one in which a scale belongs to a row, or to the whole."""
    match spec.granularity:
        case PerColumn():
            return x.t()
        case PerGroup(size):
            return x.reshape(-1, size)
    return x


def _from_rows(rows: Tensor, spec: QuantSpec, shape: tuple[int, ...]) -> Tensor:
    return rows.t() if isinstance(spec.granularity, PerColumn) else rows.view(shape)


def _scale_shape(spec: QuantSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    match spec.granularity:
        case PerTensor():
            return 1, 1
        case PerColumn():
            return 1, shape[1]
        case PerGroup(size):
            return shape[0], shape[1] // size, 1
    return shape[0], 1


def quantize_operand(x: Tensor, spec: QuantSpec, dtype: torch.dtype, *, codes: bool) -> Decoded | None:
    """Quantize a matrix into what a GEMM multiplies; None where the kernels do not cover it.

    Args:
        x: [R, K], bfloat16 or float32, any strides.
        spec: as in `quantize`.
        dtype: of the result.
        codes: whether as stored codes, too.
    """
    plan = _readable(x, spec, codes)
    if plan is None:
        return None
    inner, stored, scale = _quantized(x, spec, plan, dtype, codes)
    packed = PackedTensor(stored, scale, spec, tuple(x.shape)) if codes else None
    return Decoded(_from_rows(inner, spec, x.shape), None if plan.scaled else scale, spec, packed)


def pack_operand(x: Tensor, spec: QuantSpec) -> PackedTensor | None:
    """Quantize a matrix into stored codes and scales alone; None where the kernels do not cover it. Args as above."""
    plan = _readable(x, spec, True)
    if plan is None:
        return None
    _, stored, scale = _quantized(x, spec, plan, None, True)
    return PackedTensor(stored, scale, spec, tuple(x.shape))


def _readable(x: Tensor, spec: QuantSpec, codes: bool) -> _Plan | None:
    plan = _plan_for(spec, x.shape, x.device)
    # Subclasses (codes as a parameter, shards) have no memory of their own that holds their numbers.
    readable = x.dtype in (torch.bfloat16, torch.float32) and type(x) in (Tensor, nn.Parameter)
    return None if not readable or (codes and spec.format.bits != 8) else plan


def _quantized(
    x: Tensor, spec: QuantSpec, plan: _Plan, dtype: torch.dtype | None, codes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of a dtype, codes, scales; empty what is not wanted."""
    rows, nothing = _as_rows(x, spec), x.new_empty((1, 0), dtype=torch.uint8)
    inner = nothing if dtype is None else torch.empty_like(rows, dtype=dtype)
    stored = x.new_empty(x.numel() if codes else 0, dtype=torch.uint8)
    scale = x.new_empty(_scale_shape(spec, x.shape), dtype=torch.float32)
    as_rows = _as_rows(stored.view(x.shape), spec) if codes else nothing
    _launch(rows, (inner, as_rows, scale), plan, dtype is not None, codes)
    return inner, stored, scale


def decode_operand(packed: PackedTensor, dtype: torch.dtype, *, whole: bool) -> Decoded | None:
    """Decode stored codes into what a GEMM multiplies; None where the kernels do not cover it.

    Args:
        packed: of a matrix.
        dtype: of the result.
        whole: its numbers: with the scales that a GEMM would apply to its sums.
    """
    spec, shape = packed.spec, packed.shape
    plan = _plan_for(spec, shape, packed.codes.device) if spec.format.bits == 8 else None
    if plan is None:
        return None
    scaled = whole or plan.scaled
    codes, inner = (_as_rows(t.view(shape), spec) for t in (packed.codes, packed.codes.new_empty(shape, dtype=dtype)))
    k = kernels("rows")
    assert k is not None
    (height, width), warps = tile_for(plan.of, "NONE")
    key = plan.of, plan.mantissa, plan.lowest, scaled
    launch(
        k.decode, (-(-codes.shape[1] // width), -(-codes.shape[0] // height), 1),
        (codes, packed.scale, inner, *codes.shape, *codes.stride(), *inner.stride()),
        lambda: {**dict(zip(("OF", "M", "LOWEST", "SCALED"), key, strict=True)), "BR": height, "BK": width,
                 "num_warps": warps, "enable_fp_fusion": False}, key, inner.device,
    )  # fmt: skip
    return Decoded(_from_rows(inner, spec, shape), None if scaled else packed.scale, spec)


_CONSTANTS = "OF", "HIGH", "M", "LOWEST", "FLOOR", "TOP", "RULE", "SCALED"


def _launch(x: Tensor, results: tuple[Tensor, Tensor, Tensor], plan: _Plan, numbers: bool, codes: bool) -> None:
    k, (rows, columns) = kernels("rows"), x.shape
    assert k is not None
    largest = launch_amax(x, plan.of, "NONE")
    inner, stored, _ = results
    (height, width), warps = tile_for(plan.of, "NONE")

    def constants() -> dict[str, Any]:
        wanted = {"NUMBERS": numbers, "CODES": codes, "BR": height, "BK": width}
        return dict(zip(_CONSTANTS, plan, strict=True)) | wanted | {"num_warps": warps, "enable_fp_fusion": False}

    launch(
        k.quantize_operand, (-(-columns // width), -(-rows // height), 1),
        (x, largest, *results, rows, columns, *x.stride(), *inner.stride(), *stored.stride()),
        constants, (plan, numbers, codes), x.device,
    )  # fmt: skip
