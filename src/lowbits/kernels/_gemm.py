# SPDX-License-Identifier: Apache-2.0
"""Multiply two quantized operands.

Shapes: M rows of the left operand, N rows of the right one, K the contraction. Two ways to run:

- simulated: decode both operands to the compute dtype and multiply, sums in float32. Any recipe, any device, no speed
  gained. Scales that a tensor core would apply to the sums are applied to the sums (`QTensor.factors`), so the numbers
  are those of the hardware up to the order of summation: every E2M1 times E4M3, and every FP8 number, is exact in
  bfloat16, and a product of two is exact in float32.
- native: multiply the codes on integer or FP8 units and apply the scales to the sums,

        y[m, n] = scale_lhs[m] scale_rhs[n] sum_k lhs[m, k] rhs[n, k],

  which needs scales that are constant along the contraction: `PerTensor` or `PerRow`, and no zero point. FP8 codes may
  have a scale for every 128 elements of it instead, which are applied to the sums of 128 products.

Which implementation runs natively: int8 codes are summed exactly in int32, by Triton on CUDA and by oneDNN on a CPU,
so both give the same numbers. FP8 goes through torch's `_scaled_mm` (cuBLAS and CUTLASS); with block scales too where
torch has that and blocks are whole, else through Triton.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from lowbits.errors import NativeError
from lowbits.formats import IntFormat
from lowbits.kernels._coded import Coded, of_blocks
from lowbits.kernels._decoded import Decoded
from lowbits.kernels._matmul import matmul_blocks, matmul_codes, matmul_fp8
from lowbits.kernels._operators import as_dtype
from lowbits.quantizers import QTensor

INT32_TERMS = (2**31 - 1) // 128**2
"""The longest sum of int8 products that cannot overflow int32."""

Operand = Tensor | QTensor | Coded | Decoded


class Execution(Enum):
    """How the GEMMs of a recipe run.

    - SIMULATED: on decoded operands, on any device;
    - NATIVE: on integer or FP8 units; refused where scales, formats or device do not allow it;
    - AUTO: each GEMM natively where scales and formats allow it and the device has the units, simulated elsewhere.
    """

    SIMULATED = "simulated"
    NATIVE = "native"
    AUTO = "auto"


def scaled_mm(lhs: Operand, rhs: Operand, dtype: torch.dtype, *, fast: bool = False) -> Tensor:
    """Return lhs @ rhs.T: on units for two `Coded` operands, on decoded numbers for others.

    Args:
        lhs: [M, K], a tensor in high precision, a quantized one, or one that is coded or decoded already.
        rhs: [N, K], likewise.
        dtype: of the result, and of the decoded operands when simulated.
        fast: whether FP8 units may keep sums in fewer bits than float32; with scales of rows or of the whole alone.
    Returns:
        [M, N] of `dtype`.
    Raises:
        NativeError: int32 sums of so many products could overflow.
    """
    if isinstance(lhs, Coded) and isinstance(rhs, Coded):
        return _native(lhs, rhs, dtype, fast)
    assert not isinstance(lhs, Coded) and not isinstance(rhs, Coded), "both operands are codes, or none is"
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
    return as_dtype(sums if outer_b is None else sums * outer_b.t(), dtype)


Simulated = Tensor | QTensor | Decoded


def _in_one_basis(lhs: Simulated, rhs: Simulated) -> tuple[Simulated, Simulated]:
    """Orthonormal rotations cancel where both operands have the same one; others are undone."""
    transforms = [None if isinstance(x, Tensor) else x.spec.transform for x in (lhs, rhs)]
    if transforms[0] == transforms[1]:
        return lhs, rhs
    a, b = (
        x.dequantize() if not isinstance(x, Tensor) and transform is not None else x
        for x, transform in zip((lhs, rhs), transforms, strict=True)
    )
    return a, b


def _native(lhs: Coded, rhs: Coded, dtype: torch.dtype, fast: bool) -> Tensor:
    if isinstance(lhs.spec.format, IntFormat):
        terms = lhs.length  # what fills the codes up is zeros
        if terms > INT32_TERMS:
            raise NativeError(
                f"int8 sums of {terms} products can overflow int32; {INT32_TERMS} is the longest. Simulate."
            )
        return matmul_codes(lhs.codes, rhs.codes, lhs.scale, rhs.scale, dtype)
    if of_blocks(lhs.spec):
        return matmul_blocks(lhs.codes, rhs.codes, lhs.scale, rhs.scale, dtype)
    return as_dtype(matmul_fp8(lhs.codes, rhs.codes, lhs.scale, rhs.scale, fast), dtype)
