# SPDX-License-Identifier: Apache-2.0
"""Multiply two quantized operands.

Shapes: M rows of the left operand, N rows of the right one, K the contraction. Two ways to run:

- simulated: decode both operands to the compute dtype and multiply, sums in float32. Any recipe, any device, no speed
  gained. Scales that a tensor core would apply to the sums are applied to the sums (`QTensor.factors`), so the numbers
  are those of the hardware up to the order of summation: every E2M1 times E4M3, and every FP8 number, is exact in
  bfloat16, and a product of two is exact in float32.
- native: multiply the codes on integer or FP8 units and apply the scales to the sums,

        y[m, n] = scale_lhs[m] scale_rhs[n] sum_k lhs[m, k] rhs[n, k],

  which needs scales that are constant along the contraction: `PerTensor` or `PerRow`, and no zero point.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowbits.errors import NativeError
from lowbits.formats import E4M3, E5M2, Format, IntFormat
from lowbits.kernels._blocks import Decoded
from lowbits.quantizers import (
    AbsMean,
    Amax,
    Microscaling,
    PerRow,
    PerTensor,
    PowerOfTwo,
    QTensor,
    QuantSpec,
    ReciprocalAmax,
    TwoLevel,
)

_FLOAT8: dict[Format, torch.dtype] = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
_INT32_TERMS = (2**31 - 1) // 128**2  # longest sum of int8 products that cannot overflow int32


class Execution(Enum):
    """How the GEMMs of a recipe run."""

    SIMULATED = "simulated"
    NATIVE = "native"


def illegal_on_hardware(lhs: QuantSpec | None, rhs: QuantSpec | None) -> str | None:
    """Say why a GEMM of these operands cannot run on integer or FP8 units; None if it can.

    Args:
        lhs: how the left operand is quantized, None for high precision.
        rhs: the right operand's.
    """
    if lhs is None or rhs is None:
        return "an operand is in high precision"
    for spec in (lhs, rhs):
        if not isinstance(spec.granularity, PerTensor | PerRow):
            return f"the scales of `{spec}` vary along the contraction"
        if isinstance(spec.scale, TwoLevel | Microscaling):
            return f"the scales of `{spec}` are themselves in 8 bits, which needs units for block scales"
        if not isinstance(spec.scale, Amax | PowerOfTwo | ReciprocalAmax | AbsMean):
            return f"`{spec}` has a zero point"
        if isinstance(spec.format, IntFormat) and spec.format.max > 127:
            return f"`{spec}` does not fit signed 8-bit operands"
    if lhs.transform != rhs.transform:
        return "the operands are rotated differently"
    integers = [isinstance(spec.format, IntFormat) for spec in (lhs, rhs)]
    if all(integers) or all(spec.format in _FLOAT8 for spec in (lhs, rhs)):
        return None
    return f"there is no unit for {lhs.format.name} x {rhs.format.name}"


Operand = Tensor | QTensor | Decoded


def scaled_mm(lhs: Operand, rhs: Operand, dtype: torch.dtype, execution: Execution) -> Tensor:
    """Return lhs @ rhs.T.

    Args:
        lhs: [M, K], a tensor in high precision, a quantized one, or one that is decoded already.
        rhs: [N, K], likewise.
        dtype: of the result, and of the decoded operands when simulated.
        execution: NATIVE runs on the codes or raises; it never falls back.
    Returns:
        [M, N] of `dtype`.
    Raises:
        NativeError: native was asked for and scales, formats or device do not allow it.
    """
    if execution is Execution.NATIVE:
        return _native(lhs, rhs, dtype)
    a, b = _in_one_basis(lhs, rhs)
    (a, outer_a), (b, outer_b) = ((x, None) if isinstance(x, Tensor) else x.factors() for x in (a, b))
    if outer_a is None and outer_b is None:
        return a.to(dtype) @ b.to(dtype).t()
    # bfloat16 sums would be rounded twice. Where a GEMM has no float32 output (CPUs), float32 operands have the same
    # products.
    if dtype == torch.bfloat16 and a.device.type == "cuda":
        sums = torch.mm(a.to(dtype), b.to(dtype).t(), out_dtype=torch.float32)
    else:
        sums = a.to(dtype).float() @ b.to(dtype).float().t()
    sums = sums if outer_a is None else sums * outer_a
    return (sums if outer_b is None else sums * outer_b.t()).to(dtype)


def _in_one_basis(lhs: Operand, rhs: Operand) -> tuple[Operand, Operand]:
    """Orthonormal rotations cancel where both operands have the same one; others are undone."""
    transforms = [None if isinstance(x, Tensor) else x.spec.transform for x in (lhs, rhs)]
    if transforms[0] == transforms[1]:
        return lhs, rhs
    a, b = (
        x.dequantize() if not isinstance(x, Tensor) and transform is not None else x
        for x, transform in zip((lhs, rhs), transforms, strict=True)
    )
    return a, b


def _native(lhs: Operand, rhs: Operand, dtype: torch.dtype) -> Tensor:
    specs = [None if isinstance(x, Tensor) else x.spec for x in (lhs, rhs)]
    reason = illegal_on_hardware(*specs)
    if reason is not None or not isinstance(lhs, QTensor) or not isinstance(rhs, QTensor):
        raise NativeError(f"this GEMM cannot run natively: {reason}. Use Execution.SIMULATED or another recipe.")
    if isinstance(lhs.spec.format, IntFormat):
        return _int8_mm(lhs, rhs, dtype)
    return _float8_mm(lhs, rhs, dtype)


def _int8_mm(lhs: QTensor, rhs: QTensor, dtype: torch.dtype) -> Tensor:
    """Exact int32 sums, then the scales in float32: the only rounding is the epilogue's."""
    terms = lhs.values.shape[1]
    if terms > _INT32_TERMS:
        raise NativeError(f"int8 sums of {terms} products can overflow int32; {_INT32_TERMS} is the longest. Simulate.")
    # CUDA's int8 GEMM takes K and N in multiples of 8 and M above 16; zeros add nothing to the sums.
    m, n = lhs.values.shape[0], rhs.values.shape[0]
    a = pad(lhs.values.to(torch.int8), (0, -terms % 8, 0, max(17 - m, 0)))
    b = pad(rhs.values.to(torch.int8), (0, -terms % 8, 0, -n % 8))
    sums = torch.ops.aten._int_mm(a, b.t())[:m, :n]
    return (sums.float() * lhs.scale * rhs.scale.t()).to(dtype)


def _float8_mm(lhs: QTensor, rhs: QTensor, dtype: torch.dtype) -> Tensor:
    device = lhs.values.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise NativeError(f"{device} has no FP8 GEMM (needs CUDA capability 8.9). Use Execution.SIMULATED.")
    m, n, terms = lhs.values.shape[0], rhs.values.shape[0], lhs.values.shape[1]
    a = pad(lhs.values, (0, -terms % 16)).to(_FLOAT8[lhs.spec.format]).contiguous()
    b = pad(rhs.values, (0, -terms % 16, 0, -n % 16)).to(_FLOAT8[rhs.spec.format]).contiguous()
    tensorwise = lhs.scale.numel() == 1 and rhs.scale.numel() == 1
    scale_a = lhs.scale if tensorwise else lhs.scale.expand(m, 1).contiguous()
    scale_b = rhs.scale if tensorwise else pad(rhs.scale.expand(n, 1), (0, 0, 0, -n % 16)).t().contiguous()
    return torch.ops.aten._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16)[:, :n].to(
        dtype
    )
