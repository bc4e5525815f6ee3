# SPDX-License-Identifier: Apache-2.0
"""INT8 in all three GEMMs, with the scales that an integer GEMM can take out of its sum.

Each operand is quantized once for every GEMM it enters, along that GEMM's contraction (torchao's INT8 mixed-precision
training is built alike). The codes go through the device's int8 GEMM: exact int32 sums, so CPU and GPU give the same
numbers. Where there is none, they are simulated, or refused by the `_native` recipe.
"""

from __future__ import annotations

from dataclasses import replace

from lowbits.formats import INT8
from lowbits.nn import Execution, Gemm, Recipe
from lowbits.quantizers import PerRow, QuantSpec

_ROW = QuantSpec(INT8, PerRow())
INT8_ROWWISE = Recipe(fprop=Gemm(_ROW, _ROW), dgrad=Gemm(_ROW, _ROW), wgrad=Gemm(_ROW, _ROW), execution=Execution.AUTO)

RECIPES: dict[str, Recipe] = {
    "int8_rowwise": INT8_ROWWISE,
    "int8_rowwise_native": replace(INT8_ROWWISE, execution=Execution.NATIVE),
}
"""INT8 along legal axes."""
