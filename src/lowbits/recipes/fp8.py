# SPDX-License-Identifier: Apache-2.0
"""FP8 in all three GEMMs (Micikevicius et al. 2022, arXiv:2209.05433: E4M3 forward, E5M2 for gradients).

- tensorwise: one scale a tensor; gradients in E5M2 for its range ("hybrid"), or E4M3 throughout.
- rowwise: one scale for each vector that the GEMM contracts; E4M3 throughout, since a row's range is small. torchao
  rounds these scales to powers of two (`fp8_rowwise_pow2`) and offers wgrad in bf16 (`fp8_rowwise_hp_wgrad`).
  Where it multiplies, fprop's sums are kept in the units (`fp8_rowwise_fast`); elsewhere all are added up in float32.
- block: 1x128 for X and G, 128x128 for W, powers of two (DeepSeek-AI 2024, arXiv:2412.19437, sec. 3.3).

Scales are computed from the tensor at hand, with torchao's arithmetic. Delayed scaling takes them from the amaxes of
earlier steps: a history that must be kept, reduced over ranks, checkpointed and guarded against a first batch of zeros.
It was there to save a pass over the tensor; a fused kernel needs no such pass. It would be the one thing that makes a
recipe stateful, so it is left out. FP8 units multiply the codes where a GPU has them, elsewhere they are simulated; the
`_native` recipes refuse to run elsewhere.
"""

from __future__ import annotations

from dataclasses import replace

from lowbits.formats import E4M3, E5M2
from lowbits.nn import Execution, Gemm, Recipe, Save
from lowbits.quantizers import PerGroup, PerRow, PerTile, PowerOfTwo, QuantSpec, ReciprocalAmax

_X, _G = QuantSpec(E4M3, scale=ReciprocalAmax()), QuantSpec(E5M2, scale=ReciprocalAmax())
_ROW, _ROW2 = QuantSpec(E4M3, PerRow(), ReciprocalAmax()), QuantSpec(E4M3, PerRow(), PowerOfTwo())
_BLOCK, _TILE = QuantSpec(E4M3, PerGroup(128), PowerOfTwo()), QuantSpec(E4M3, PerTile(128, 128), PowerOfTwo())

FP8_TENSORWISE = Recipe(fprop=Gemm(_X, _X), dgrad=Gemm(_G, _X), wgrad=Gemm(_G, _X), execution=Execution.AUTO)
FP8_ROWWISE = Recipe(fprop=Gemm(_ROW, _ROW), dgrad=Gemm(_ROW, _ROW), wgrad=Gemm(_ROW, _ROW), execution=Execution.AUTO)

RECIPES: dict[str, Recipe] = {
    "fp8_tensorwise": FP8_TENSORWISE,
    "fp8_tensorwise_e4m3": replace(FP8_TENSORWISE, dgrad=Gemm(_X, _X), wgrad=Gemm(_X, _X)),
    "fp8_rowwise": FP8_ROWWISE,
    "fp8_rowwise_pow2": replace(
        FP8_ROWWISE, fprop=Gemm(_ROW2, _ROW2), dgrad=Gemm(_ROW2, _ROW2), wgrad=Gemm(_ROW2, _ROW2)
    ),
    "fp8_rowwise_hp_wgrad": replace(FP8_ROWWISE, wgrad=Gemm()),
    "fp8_rowwise_fast": replace(FP8_ROWWISE, fast_accumulation=("fprop",)),
    "fp8_block": Recipe(
        fprop=Gemm(_BLOCK, _TILE),
        dgrad=Gemm(_BLOCK, _TILE),
        wgrad=Gemm(_BLOCK, _BLOCK),
        save=Save.OPERANDS,
        execution=Execution.AUTO,
    ),
    "fp8_tensorwise_native": replace(FP8_TENSORWISE, execution=Execution.NATIVE),
    "fp8_rowwise_native": replace(FP8_ROWWISE, execution=Execution.NATIVE),
}
"""FP8, simulated and native."""
