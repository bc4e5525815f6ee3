# SPDX-License-Identifier: Apache-2.0
"""Quantize the operands of a GEMM on a GPU in one or two passes; see `lowbits.kernels.blocks`.

Covered: floats of 4 to 8 bits in groups and tiles of 2 to 128 elements a side, under two-level scales in
TransformerEngine's order, shared exponents rounded up or down, and powers of two; rotations of up to 64 elements; all
roundings. Scales of rows and columns: `_row_operands`. The rest takes the eager definition, which computes the same
bits.
"""

from __future__ import annotations

import ast
import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbits.formats import FloatFormat
from lowbits.kernels import _row_operands
from lowbits.kernels._decoded import Decoded
from lowbits.kernels._launch import launch
from lowbits.kernels._operators import operator, remembered
from lowbits.kernels._units import kernels, launches
from lowbits.quantizers import (
    BlockRounding,
    Hadamard,
    Microscaling,
    Order,
    PackedTensor,
    PerGroup,
    PerTile,
    PowerOfTwo,
    QuantSpec,
    Rounding,
    SharedExponent,
    TwoLevel,
)

_ROUNDINGS = {
    Rounding.NEAREST: "NEAREST", Rounding.STOCHASTIC: "UNIFORM24", Rounding.STOCHASTIC_8BIT: "CENTRED8",
    Rounding.STOCHASTIC_8BIT_FLOOR: "FLOOR8",
}  # fmt: skip
_GROUPS = 4, 128  # groups and rows that a program of `lowbits.kernels.columns` works on
_DRAWN_TOGETHER = {"NEAREST": 1, "UNIFORM24": 4, "CENTRED8": 16, "FLOOR8": 16}


class _Plan(NamedTuple):
    """What the kernels are compiled for."""

    mantissa: int
    lowest: int
    bits: int
    largest: float
    nan: int
    rule: str
    rounding: str
    rows: int
    columns: int
    rotation: int = 1
    signs: int = 0
    bf16: bool = False


@remembered
def _plan(spec: QuantSpec) -> _Plan | None:
    fmt, granularity, transform = spec.format, spec.granularity, spec.transform
    if not isinstance(fmt, FloatFormat) or not 4 <= fmt.bits <= 8 or not fmt.subnormals or fmt.only_zero_is_zero:
        return None
    if not isinstance(granularity, PerGroup | PerTile) or fmt.top_codes_lost not in (0, 1, 4):
        return None
    group = isinstance(granularity, PerGroup)
    rows, columns = (1, granularity.size) if group else (granularity.rows, granularity.columns)
    rule, rotation = _rule(spec), transform.size if transform else 1
    powers = all(n & (n - 1) == 0 and n <= 128 for n in (rows, columns))
    if rule is None or not powers or columns < 2 or rotation > 64 or not _rotates(transform):
        return None
    signs = sum(1 << i for i, sign in enumerate(transform.signs) if sign < 0) if transform and transform.signs else 0
    nan = 0 if fmt.top_codes_lost == 0 else (1 << (fmt.bits - 1)) - 1
    return _Plan(
        fmt.mantissa_bits, fmt.min_normal_exponent, fmt.bits, fmt.max, nan, rule, _ROUNDINGS[spec.rounding], rows,
        columns, rotation, signs, transform is not None and transform.dtype == torch.bfloat16,
    )  # fmt: skip


def _rotates(transform: Hadamard | None) -> bool:
    return transform is None or transform.dtype in (torch.bfloat16, torch.float32)


def _rule(spec: QuantSpec) -> str | None:
    match spec.scale:
        case TwoLevel(Order.TRANSFORMER_ENGINE, power_of_two, rounding):
            if power_of_two:
                return "TWO_LEVEL_POW2" if rounding is BlockRounding.NEAREST else None
            return "TWO_LEVEL" if rounding is BlockRounding.NEAREST else "TWO_LEVEL_UP"
        case Microscaling(SharedExponent.UP):
            return "SHARED_UP"
        case Microscaling(SharedExponent.FLOOR):
            return "SHARED_FLOOR"
        case PowerOfTwo(0.0):
            return "POWER_OF_TWO"
    return None


def plan_for(x: Tensor, spec: QuantSpec) -> _Plan | None:
    """Return how the kernels quantize a matrix; None where they do not."""
    readable = x.ndim == 2 and x.numel() > 0 and x.dtype in (torch.bfloat16, torch.float32)
    if not readable or not launches("blocks", x.device):
        return None
    plan = _plan(spec)
    if plan is None:
        return None
    length = spec.padded(x.shape)[1]
    whole_words = length % _DRAWN_TOGETHER[plan.rounding] == 0
    return plan if whole_words and (plan.bits != 4 or length % 2 == 0) else None


def quantize_operand(
    x: Tensor, spec: QuantSpec, noise: Tensor, role: int, dtype: torch.dtype, *, codes: bool = False
) -> Decoded | None:
    """Quantize a matrix into what a GEMM multiplies; None where no kernels cover it.

    Args:
        x: [R, K], bfloat16 or float32, any strides.
        spec: as in `quantize`.
        noise: int64, the step first; the two words of the stream's key at `role`.
        role: see `noise`.
        dtype: of the result.
        codes: whether as stored codes, too, which is known for scales of rows, columns and the whole alone.
    """
    plan = plan_for(x, spec)
    if plan is None:
        return _row_operands.quantize_operand(x, spec, dtype, codes=codes)
    if codes:
        return None
    inner, _, _, outer = _quantized(x, noise, role, spec.padded(x.shape)[1], plan, dtype, codes=False)
    return Decoded(inner, _outer(outer, plan), spec)


def pack_operand(x: Tensor, spec: QuantSpec, noise: Tensor, role: int) -> PackedTensor | None:
    """Quantize a matrix into stored codes and scales; None where no kernels cover it. Args as above."""
    plan = plan_for(x, spec)
    if plan is None:
        return _row_operands.pack_operand(x, spec)
    _, codes, scales, outer = _quantized(x, noise, role, spec.padded(x.shape)[1], plan, x.dtype, codes=True)
    two_level = isinstance(spec.scale, TwoLevel)
    view = outer.view([1] * scales.ndim) if two_level else None
    return PackedTensor(codes, scales, spec, tuple(x.shape), None, view)


def unpack_operand(packed: PackedTensor, dtype: torch.dtype) -> Decoded | None:
    """Decode what `pack_operand` stored into what a GEMM multiplies; None where no kernels cover it."""
    plan = _plan(packed.spec) if launches("blocks", packed.codes.device) and len(packed.shape) == 2 else None
    if plan is None:
        return _row_operands.decode_operand(packed, dtype, whole=False)
    rows, length = packed.spec.padded(packed.shape)
    if plan.bits == 4 and length % 2:
        return None
    outer = packed.codes.new_ones((), dtype=torch.float32) if packed.outer is None else packed.outer
    arguments = packed.codes, packed.scale, outer, rows, length
    if torch.compiler.is_compiling():
        inner = _decode_blocks_op(*arguments, _as_text(plan), dtype)
    else:
        inner = _launch_decode(*arguments, plan, dtype)
    return Decoded(inner, _outer(outer, plan), packed.spec)


def _quantized(
    x: Tensor, noise: Tensor, role: int, length: int, plan: _Plan, dtype: torch.dtype, *, codes: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Through torch's dispatcher where a compiler has to see an operator; it costs as much as the launches."""
    if plan.rounding == "NEAREST":  # nothing reads the noise: layers that share an input share the result when compiled
        noise, role = x, 0
    if torch.compiler.is_compiling():
        return _quantize_blocks_op(x, noise, role, length, _as_text(plan), dtype, codes)
    return _launch_quantize(x, noise, role, length, plan, dtype, codes)


def _outer(outer: Tensor, plan: _Plan) -> Tensor | None:
    return outer.view(1, 1) if plan.rule in ("TWO_LEVEL", "TWO_LEVEL_UP") else None


def _as_text(plan: _Plan) -> str:
    """An operator takes no tuples; what was compiled for a plan is found by its text."""
    return repr(tuple(plan))


@cache
def _from_text(text: str) -> _Plan:
    return _Plan(*ast.literal_eval(text))


def _tile(plan: _Plan) -> tuple[int, int]:
    return max(64 if plan.columns <= 64 else 32, plan.rows), max(64, plan.columns, plan.rotation)


@cache
def _constants(plan: _Plan) -> dict[str, Any]:
    br, bk = _tile(plan)
    return {
        "M": plan.mantissa, "LOWEST": plan.lowest, "BITS": plan.bits, "NAN": plan.nan, "RULE": plan.rule,
        "ROWS": plan.rows, "COLUMNS": plan.columns, "BR": br, "BK": bk, "num_warps": 8 if br * bk > 8192 else 4,
        "enable_fp_fusion": False,
    }  # fmt: skip


@cache
def _rotation(plan: _Plan) -> dict[str, Any]:
    log = plan.rotation.bit_length() - 1
    return {"SIGNS": plan.signs, "SCALE": plan.rotation**-0.5, "BF16": plan.bf16, "T": plan.rotation, "LOG": log}


@cache
def _of_format(plan: _Plan) -> dict[str, Any]:
    inverse = float(torch.tensor(1 / plan.largest, dtype=torch.float32))
    return {"MAX": plan.largest, "TOP": math.frexp(plan.largest)[1] - 1, "INVERSE": inverse, "ROUNDING": plan.rounding}


def _results(
    x: Tensor, length: int, plan: _Plan, dtype: torch.dtype, codes: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, nothing = x.shape[0], x.new_empty(0)
    outer = x.new_empty((), dtype=torch.float32)
    if not codes:
        return x.new_empty(rows, length, dtype=dtype), nothing.to(torch.uint8), nothing.to(torch.uint8), outer
    blocks = math.ceil(rows / plan.rows), math.ceil(length / plan.columns)
    shape = (blocks[0], blocks[1], 1) if plan.rows == 1 else (blocks[0], 1, blocks[1], 1)
    stored = torch.float32 if plan.rule == "POWER_OF_TWO" else torch.uint8
    count = rows * length // (2 if plan.bits == 4 else 1)
    return nothing, x.new_empty(count, dtype=torch.uint8), x.new_empty(shape, dtype=stored), outer


def _launch_quantize(
    x: Tensor, noise: Tensor, role: int, length: int, plan: _Plan, dtype: torch.dtype, codes: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k = kernels("blocks")
    assert k is not None
    inner, stored, scales, outer = _results(x, length, plan, dtype, codes)
    (rows, columns), (stride_r, stride_k) = x.shape, x.stride()
    if _in_registers(plan) and stride_r == 1 and length % 16 == 0:
        _launch_columns(x, noise, (inner, stored, scales, outer), role, length, plan, codes)
        return inner, stored, scales, outer
    constants, rotation, (br, bk) = _constants(plan), _rotation(plan), _tile(plan)
    grid, whole = (-(-length // bk), -(-rows // br), 1), torch.zeros((), dtype=torch.int32, device=x.device)
    if plan.rule.startswith("TWO_LEVEL"):
        names = "BR", "BK", "num_warps", "enable_fp_fusion"
        launch(
            k.amax, grid, (x, whole, rows, columns, stride_r, stride_k),
            lambda: rotation | {name: constants[name] for name in names}, plan, x.device,
        )  # fmt: skip
    launch(
        k.quantize, grid,
        (x, noise, whole, inner, stored, scales, outer, role, rows, columns, length, stride_r, stride_k),
        lambda: rotation | constants | _of_format(plan) | {"INNER": not codes, "CODES": codes}, (plan, codes), x.device,
    )  # fmt: skip
    return inner, stored, scales, outer


def _in_registers(plan: _Plan) -> bool:
    """Whether `lowbits.kernels.columns` knows such groups."""
    two_level = plan.rule.startswith("TWO_LEVEL")
    size = plan.rotation == plan.columns == 16 and plan.rows == 1
    return size and plan.bits == 4 and two_level and plan.rounding != "UNIFORM24"


def _launch_columns(
    x: Tensor, noise: Tensor, results: tuple[Tensor, ...], role: int, length: int, plan: _Plan, codes: bool
) -> None:
    k = kernels("columns")
    assert k is not None
    (rows, columns), strides, (bg, br) = x.shape, x.stride(), _GROUPS
    grid = -(-rows // br), -(-length // (16 * bg)), 1
    whole = torch.zeros((), dtype=torch.int32, device=x.device)
    shape = {"BG": bg, "BR": br, "num_warps": 4, "enable_fp_fusion": False}

    def rotation() -> dict[str, Any]:
        return shape | {name: value for name, value in _rotation(plan).items() if name in ("SIGNS", "SCALE", "BF16")}

    def constants() -> dict[str, Any]:
        names = "M", "LOWEST", "BITS", "NAN", "RULE"
        format_ = {name: value for name, value in _constants(plan).items() if name in names}
        return rotation() | format_ | _of_format(plan) | {"INNER": not codes, "CODES": codes}

    launch(k.amax, grid, (x, whole, rows, columns, *strides), rotation, plan, x.device)
    arguments = x, noise, whole, *results, role, rows, columns, length, *strides
    launch(k.quantize, grid, arguments, constants, (plan, codes), x.device)


def _launch_decode(
    codes: Tensor, scales: Tensor, outer: Tensor, rows: int, length: int, plan: _Plan, dtype: torch.dtype
) -> Tensor:
    k = kernels("blocks")
    assert k is not None
    inner = codes.new_empty(rows, length, dtype=dtype)
    br, bk = _tile(plan)
    grid = -(-length // bk), -(-rows // br), 1
    arguments = codes, scales, outer, inner, rows, length
    launch(k.decode, grid, arguments, lambda: _constants(plan), plan, codes.device)
    return inner


def _quantize_blocks(
    x: Tensor, noise: Tensor, role: int, length: int, plan_text: str, dtype: torch.dtype, codes: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _launch_quantize(x, noise, role, length, _from_text(plan_text), dtype, codes)


def _decode_blocks(
    codes: Tensor, scales: Tensor, outer: Tensor, rows: int, length: int, plan_text: str, dtype: torch.dtype
) -> Tensor:
    return _launch_decode(codes, scales, outer, rows, length, _from_text(plan_text), dtype)


_quantize_blocks_op = operator(
    _quantize_blocks,
    lambda x, noise, role, length, plan_text, dtype, codes: _results(x, length, _from_text(plan_text), dtype, codes),
)
_decode_blocks_op = operator(
    _decode_blocks,
    lambda codes, scales, outer, rows, length, plan_text, dtype: codes.new_empty(rows, length, dtype=dtype),
)
