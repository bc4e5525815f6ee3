# SPDX-License-Identifier: Apache-2.0
"""FP8 in all three GEMMs (Micikevicius et al. 2022, arXiv:2209.05433: E4M3 forward, E5M2 for gradients).

- tensorwise: one scale a tensor; gradients in E5M2 for its range.
- rowwise: one scale for each vector that the GEMM contracts; E4M3 throughout, since a row's range is small.

Scales are computed from the tensor at hand. Delayed scaling, which remembers past amaxes, would make a recipe stateful
and is left out. The `_native` ones need a GPU with FP8 units.
"""

from __future__ import annotations

from dataclasses import replace

from lowbits.formats import E4M3, E5M2
from lowbits.nn import Execution, Gemm, Recipe
from lowbits.quantizers import PerRow, QuantSpec

_X, _G, _ROW = QuantSpec(E4M3), QuantSpec(E5M2), QuantSpec(E4M3, PerRow())
FP8_TENSORWISE = Recipe(fprop=Gemm(_X, _X), dgrad=Gemm(_G, _X), wgrad=Gemm(_G, _X))
FP8_ROWWISE = Recipe(fprop=Gemm(_ROW, _ROW), dgrad=Gemm(_ROW, _ROW), wgrad=Gemm(_ROW, _ROW))

RECIPES: dict[str, Recipe] = {
    "fp8_tensorwise": FP8_TENSORWISE,
    "fp8_rowwise": FP8_ROWWISE,
    "fp8_tensorwise_native": replace(FP8_TENSORWISE, execution=Execution.NATIVE),
    "fp8_rowwise_native": replace(FP8_ROWWISE, execution=Execution.NATIVE),
}
"""FP8, simulated and native."""
