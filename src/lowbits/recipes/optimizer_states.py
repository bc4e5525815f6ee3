# SPDX-License-Identifier: Apache-2.0
"""Optimizer states alone in few bits, block by block (Dettmers et al. 2022, arXiv:2110.02861).

    adam8bit         both moments in 8 bits by the dynamic code books, a scale for 256 elements: 2.03 bytes a parameter
    adam8bit_linear  the same blocks on a linear grid, signed for both: the published negative control

The states of the converted layers' weights are quantized; embeddings, norms and biases keep 32 bits.
"""

from __future__ import annotations

from lowbits.formats import DYNAMIC8, INT8, UDYNAMIC8
from lowbits.nn import Recipe
from lowbits.quantizers import PerBlock, QuantSpec

_BLOCK = PerBlock(256)
_LINEAR = QuantSpec(INT8, _BLOCK)

RECIPES: dict[str, Recipe] = {
    "adam8bit": Recipe(first_moment=QuantSpec(DYNAMIC8, _BLOCK), second_moment=QuantSpec(UDYNAMIC8, _BLOCK)),
    "adam8bit_linear": Recipe(first_moment=_LINEAR, second_moment=_LINEAR),
}
"""8-bit AdamW states."""
