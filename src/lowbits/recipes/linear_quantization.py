# SPDX-License-Identifier: Apache-2.0
"""The grid of the linear-quantization study (Chitsaz et al. 2024, arXiv:2407.11722), by its own names.

    w  weights in fprop          w8_channel: INT8, one scale an output channel
    a  activations in fprop      a8_token:   INT8, one scale a token
    g  output gradients          g8_token:   INT8, one scale a token, in wgrad (the published default)
                                 g8_token_dgrad: in dgrad instead
    m  Adam's first moment       m4_channel: INT4, one scale an output channel
    v  Adam's second moment      v8_channel: INT8, signed, as published; v8_channel_no_zero: codes 1..255

All are the reference's placement: backward GEMMs see the original operands. `_faithful` ones are operand-faithful:
backward sees what fprop multiplied, kept as codes. `w8a8_saved8` keeps all that waits for the backward pass of the
blocks in INT8, one scale for 128 elements of memory: norms, attention and activation functions keep more than linear
layers. Scales have no floor; the published one hides small gradients and second moments (`Amax(floor=...)` brings it
back).
"""

from __future__ import annotations

from dataclasses import replace

from lowbits.formats import INT4, INT8, UINT8_NO_ZERO, IntFormat
from lowbits.nn import Gemm, Recipe, Save
from lowbits.quantizers import Granularity, PerBlock, PerColumn, PerRow, PerTensor, QuantSpec, StudyAsymmetric

_FORMATS = {8: INT8, 4: INT4}
_WEIGHT: dict[str, Granularity] = {"tensor": PerTensor(), "channel": PerRow()}
_INPUT: dict[str, Granularity] = {"tensor": PerTensor(), "token": PerRow(), "column": PerColumn()}
# G is [tokens, out] in dgrad and [out, tokens] in wgrad, so a token's scale lies along another axis.
_GRAD_DGRAD: dict[str, Granularity] = {"tensor": PerTensor(), "token": PerRow()}
_GRAD_WGRAD: dict[str, Granularity] = {"tensor": PerTensor(), "token": PerColumn()}


def _first(fmt: IntFormat, granularity: Granularity) -> Recipe:
    return Recipe(first_moment=QuantSpec(fmt, granularity))


def _second(fmt: IntFormat, granularity: Granularity) -> Recipe:
    return Recipe(second_moment=QuantSpec(fmt, granularity))


_W8, _A8 = QuantSpec(INT8, PerRow()), QuantSpec(INT8, PerRow())
_G8 = QuantSpec(INT8, PerColumn())
W8A8 = Recipe(fprop=Gemm(_A8, _W8))
W8A8G8 = replace(W8A8, wgrad=Gemm(_G8, None))

RECIPES: dict[str, Recipe] = {
    **{f"w{b}_{n}": Recipe(fprop=Gemm(None, QuantSpec(f, g))) for b, f in _FORMATS.items() for n, g in _WEIGHT.items()},
    **{f"a{b}_{n}": Recipe(fprop=Gemm(QuantSpec(f, g), None)) for b, f in _FORMATS.items() for n, g in _INPUT.items()},
    **{
        f"a{b}_token_asym": Recipe(fprop=Gemm(QuantSpec(f, PerRow(), StudyAsymmetric()), None))
        for b, f in _FORMATS.items()
    },
    **{
        f"g{b}_{n}": Recipe(wgrad=Gemm(QuantSpec(f, g), None))
        for b, f in _FORMATS.items()
        for n, g in _GRAD_WGRAD.items()
    },
    **{
        f"g{b}_{n}_dgrad": Recipe(dgrad=Gemm(QuantSpec(f, g), None))
        for b, f in _FORMATS.items()
        for n, g in _GRAD_DGRAD.items()
    },
    **{f"m{b}_{n}": _first(f, g) for b, f in _FORMATS.items() for n, g in _WEIGHT.items()},
    **{f"v{b}_{n}": _second(f, g) for b, f in _FORMATS.items() for n, g in _WEIGHT.items()},
    "v8_channel_no_zero": _second(UINT8_NO_ZERO, PerRow()),
    "w8a8": W8A8,
    "w8a8g8": W8A8G8,
    "w8a8_faithful": replace(W8A8, save=Save.QUANTIZED),
    "w8a8_saved8": replace(W8A8, saved_activations=QuantSpec(INT8, PerBlock(128))),
    "w8a8g8_faithful": replace(W8A8G8, save=Save.QUANTIZED),
    "w4a4": Recipe(fprop=Gemm(QuantSpec(INT4, PerRow()), QuantSpec(INT4, PerRow()))),
}
"""Every configuration of the study, and the operand-faithful twins of the combined ones."""
