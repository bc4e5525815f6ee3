# SPDX-License-Identifier: Apache-2.0
"""OCP Microscaling formats (MX specification 1.0): 32 elements under one power of two, in all three GEMMs.

The shared exponent is rounded up by default, so that nothing saturates; the OCP specification's floor rule, which
diverges at scale (arXiv:2506.08027), is in the `_floor` ones. Everything is exact in bfloat16.

`mxfp4` is NVFP4's recipe with MX blocks, as NVIDIA compared the two (arXiv:2509.25149, sec. 5): 32x32 weights, a
Hadamard transform of 32 on wgrad's operands, stochastic gradients. `mxfp4_plain` rounds to nearest, nothing else.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lowbits.formats import E2M1, E2M3, E3M2, E4M3, FloatFormat
from lowbits.nn import Gemm, Recipe, Save
from lowbits.quantizers import Hadamard, Microscaling, PerGroup, PerTile, QuantSpec, Rounding, SharedExponent

_BLOCK = 32


def microscaling(fmt: FloatFormat, exponent: SharedExponent = SharedExponent.UP) -> Recipe:
    """Return all operands in 1x32 blocks of one format, rounded to nearest.

    Args:
        fmt: of the elements.
        exponent: rule of the shared exponent.
    """
    spec = QuantSpec(fmt, PerGroup(_BLOCK), Microscaling(exponent))
    return Recipe(fprop=Gemm(spec, spec), dgrad=Gemm(spec, spec), wgrad=Gemm(spec, spec), save=Save.OPERANDS)


def mxfp4(exponent: SharedExponent = SharedExponent.UP) -> Recipe:
    """Return MXFP4 with everything that NVFP4's recipe does for it.

    Args:
        exponent: rule of the shared exponent.
    """
    x = QuantSpec(E2M1, PerGroup(_BLOCK), Microscaling(exponent))
    w = replace(x, granularity=PerTile(_BLOCK, _BLOCK))
    g = replace(x, rounding=Rounding.STOCHASTIC_8BIT)
    rht = Hadamard.random(_BLOCK, seed=1, dtype=torch.bfloat16)
    return Recipe(
        fprop=Gemm(x, w),
        dgrad=Gemm(g, w),
        wgrad=Gemm(replace(g, transform=rht), replace(x, transform=rht)),
        save=Save.OPERANDS,
    )


RECIPES: dict[str, Recipe] = {
    "mxfp8": microscaling(E4M3),
    "mxfp8_floor": microscaling(E4M3, SharedExponent.FLOOR),
    "mxfp6_e2m3": microscaling(E2M3),
    "mxfp6_e3m2": microscaling(E3M2),
    "mxfp4": mxfp4(),
    "mxfp4_floor": mxfp4(SharedExponent.FLOOR),
    "mxfp4_plain": microscaling(E2M1),
}
"""MXFP8, MXFP6 and MXFP4."""
