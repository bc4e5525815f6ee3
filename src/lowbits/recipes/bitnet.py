# SPDX-License-Identifier: Apache-2.0
"""BitNet b1.58: ternary weights and int8 activations in the forward pass, over float masters.

Ma et al. 2024, "The Era of 1-bit LLMs", arXiv:2402.17764, eq. 1 to 3: weights by the mean of their magnitudes, per
tensor; activations by their largest, per token. Both backward GEMMs see what fprop multiplied; gradients in high
precision go to the master unchanged. The model has sub-norms besides: the method `bitnet` puts them there.
"""

from __future__ import annotations

from dataclasses import replace

from lowbits.formats import INT8, TERNARY
from lowbits.nn import Gemm, Recipe, Save
from lowbits.quantizers import AbsMean, Amax, PerRow, QuantSpec

_X, _W = QuantSpec(INT8, PerRow(), Amax(1e-5)), QuantSpec(TERNARY, scale=AbsMean(1e-5))

BITNET_B158 = Recipe(fprop=Gemm(_X, _W), save=Save.QUANTIZED)

RECIPES: dict[str, Recipe] = {
    "bitnet_b158": BITNET_B158,
    "bitnet_a8": replace(BITNET_B158, fprop=Gemm(_X, None), save=Save.ORIGINAL),
}
"""BitNet b1.58, and its activations alone over float weights."""
