# SPDX-License-Identifier: Apache-2.0
"""NVFP4 pre-training (NVIDIA 2025, arXiv:2509.25149), and every ablation of it that was published.

All three GEMMs multiply E2M1 under E4M3 scales of 16 elements and one float32 scale a tensor:

- blocks of 1x16 along the contraction for X and G, of 16x16 for W, so that W and its transpose are the same numbers;
- a random Hadamard transform of 16 elements on both operands of wgrad, and nowhere else;
- stochastic rounding of G in both backward GEMMs, nearest for X and W;
- X waits for backward as wgrad's operand, in packed codes.

Which layers stay in high precision (the paper keeps 15 %, mostly the last blocks) and when the forward pass returns to
it (at 82 %) belong to the run, not to a layer: `lowbits train --help`, keep and phases.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lowbits.formats import E2M1
from lowbits.nn import Gemm, Recipe, Save
from lowbits.quantizers import (
    NVFP4_SIGNS,
    BlockRounding,
    Hadamard,
    Order,
    PerGroup,
    PerTile,
    QuantSpec,
    Rounding,
    TwoLevel,
)

_SR = Rounding.STOCHASTIC_8BIT
_TE = TwoLevel()
_RHT = Hadamard(16, signs=NVFP4_SIGNS, dtype=torch.bfloat16)


def nvfp4(
    *,
    scale: TwoLevel = _TE,
    gradient_scale: TwoLevel | None = None,
    rht: Hadamard | None = _RHT,
    gradient: Rounding = _SR,
    forward: Rounding = Rounding.NEAREST,
    weight_tile: bool = True,
) -> Recipe:
    """Return the recipe with some of its choices changed.

    Args:
        scale: rule of all scales.
        gradient_scale: rule of G's; None is `scale`.
        rht: transform of wgrad's operands; None leaves it out.
        gradient: rounding of G.
        forward: rounding of X and W.
        weight_tile: 16x16 blocks of W; False takes 1x16 along each contraction, so fprop and dgrad see two weights.
    """
    x = QuantSpec(E2M1, PerGroup(16), scale, forward)
    w = QuantSpec(E2M1, PerTile(16, 16) if weight_tile else PerGroup(16), scale, forward)
    g = QuantSpec(E2M1, PerGroup(16), gradient_scale or scale, gradient)
    return Recipe(
        fprop=Gemm(x, w),
        dgrad=Gemm(g, w),
        wgrad=Gemm(replace(g, transform=rht), replace(x, transform=rht)),
        save=Save.OPERANDS,
    )


def _signless(size: int) -> Hadamard:
    return Hadamard(size, dtype=torch.bfloat16)


def _signed(size: int) -> Hadamard:
    return Hadamard.random(size, seed=1, dtype=torch.bfloat16)


NVFP4 = nvfp4()

RECIPES: dict[str, Recipe] = {
    "nvfp4": NVFP4,
    # ablations
    "nvfp4_forward": replace(NVFP4, dgrad=Gemm(), wgrad=Gemm(), save=Save.ORIGINAL),
    "nvfp4_backward": replace(NVFP4, fprop=Gemm()),
    "nvfp4_no_sr": nvfp4(gradient=Rounding.NEAREST),
    "nvfp4_sr_forward": nvfp4(forward=_SR),
    "nvfp4_no_rht": nvfp4(rht=None),
    "nvfp4_no_signs": nvfp4(rht=_signless(16)),
    "nvfp4_rht_2": nvfp4(rht=_signed(2)),
    "nvfp4_rht_4": nvfp4(rht=_signed(4)),
    "nvfp4_rht_32": nvfp4(rht=_signed(32)),
    "nvfp4_rht_128": nvfp4(rht=_signed(128)),
    "nvfp4_w1d": nvfp4(weight_tile=False),
    "nvfp4_naive": nvfp4(rht=None, gradient=Rounding.NEAREST, weight_tile=False),
    # options
    "nvfp4_up": nvfp4(gradient_scale=TwoLevel(rounding=BlockRounding.UP)),
    "nvfp4_pow2": nvfp4(scale=TwoLevel(power_of_two=True)),
    "nvfp4_paper_order": nvfp4(scale=TwoLevel(order=Order.PAPER)),
    "nvfp4_torchao_order": nvfp4(scale=TwoLevel(order=Order.TORCHAO_INFERENCE)),
    "nvfp4_sr_floor": nvfp4(gradient=Rounding.STOCHASTIC_8BIT_FLOOR),
    "nvfp4_sr_24bit": nvfp4(gradient=Rounding.STOCHASTIC),
}
"""The published recipe; `nvfp4(...)` makes others."""
