# SPDX-License-Identifier: Apache-2.0
"""Scales of blocks that are themselves stored in 8 bits: NVFP4's two levels, and the powers of two of MX.

All arithmetic is float32, each operation rounded once, in the order of the published code, so that codes and scale
bytes are its codes and bytes. NaN in a tensor (NVFP4) or in a block (MX) makes its scales NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

from lowbits.formats import E4M3, E8M0, Format
from lowbits.quantizers._scale import MANTISSA, Scales, quotient

_LARGEST = torch.finfo(torch.float32).max


class Order(Enum):
    """In which order the scales of two levels are computed; they differ in the last bits of some blocks.

    - TRANSFORMER_ENGINE: amax_block * (s / format.max), the code that the published models were trained with;
    - PAPER: (amax_block / format.max) * s, as arXiv:2509.25149 writes it;
    - TORCHAO_INFERENCE: torchao's `nvfp4_quantize`, whose block scales never fall below 2^-6.
    """

    TRANSFORMER_ENGINE = "te"
    PAPER = "paper"
    TORCHAO_INFERENCE = "torchao"


class BlockRounding(Enum):
    """How a block's scale is rounded to its format; UP never clips the block's largest elements."""

    NEAREST = "nearest"
    UP = "up"


@dataclass(frozen=True)
class TwoLevel:
    """A block's scale S in E4M3 under one float32 scale of the tensor                (arXiv:2509.25149, appendix)

        s = 448 format.max / amax,   S = E4M3( amax_block s / format.max ),   x ~ (1 / s) S q

    A tensor of zeros has s = 1. A block that is small beside the tensor may get S = 0 and decodes to zeros. S is
    rounded to nearest, so half of the blocks clip their largest element by up to 6 %, which stochastic rounding cannot
    mend: `BlockRounding.UP` does. An infinity in the tensor makes s = 1 and saturates.

    Args:
        order: of the arithmetic.
        power_of_two: round s down to a power of two. Then every decoded number is exact in bfloat16, and a GEMM needs
            no scale behind it; the error stays the same.
        rounding: of S.
    """

    stored: ClassVar[Format | None] = E4M3
    order: Order = Order.TRANSFORMER_ENGINE
    power_of_two: bool = False
    rounding: BlockRounding = BlockRounding.NEAREST

    def __call__(self, x: Tensor, dims: tuple[int, ...], fmt: Format) -> Scales:
        """Return block scales, extent 1 along `dims`, and the tensor's."""
        amax = x.abs().amax(dims, keepdim=True)
        if self.order is Order.TORCHAO_INFERENCE:
            return self._torchao(amax, fmt)
        outer = quotient(E4M3.max * fmt.max, amax.amax()).clamp_max(_LARGEST)
        if self.power_of_two:
            down = (outer.view(torch.int32) & ~MANTISSA).view(torch.float32)
            outer = torch.where(outer.isnan(), outer, down)
        outer = torch.where((outer == 0) | (amax.amax() == 0), 1.0, outer)
        if self.order is Order.PAPER:
            target = quotient(amax, fmt.max) * outer
        else:
            target = amax * (outer * torch.tensor(1 / fmt.max, dtype=torch.float32, device=x.device))
        scale = self._rounded(target.clamp_max(E4M3.max))
        decode = 1 / outer
        encode = (1 / (scale * decode)).clamp_max(_LARGEST)
        return Scales(scale, outer=decode.expand([1] * x.ndim), encode=encode)

    def _torchao(self, amax: Tensor, fmt: Format) -> Scales:
        outer = quotient(amax.amax(), E4M3.max * fmt.max)
        outer = torch.where(outer == 0, 1.0, outer)  # torchao makes NaN of a tensor of zeros
        if self.power_of_two:
            up = (outer.view(torch.int32) + MANTISSA) & ~MANTISSA
            outer = torch.where(outer.isfinite(), up.view(torch.float32), outer)
        scale = self._rounded((quotient(amax, fmt.max) / outer).clamp(2.0**E4M3.min_normal_exponent, E4M3.max))
        return Scales(scale, outer=outer.expand([1] * amax.ndim), encode=(1 / outer) / scale)

    def _rounded(self, target: Tensor) -> Tensor:
        nearest = E4M3.project(target)
        if self.rounding is BlockRounding.NEAREST:
            return nearest
        return torch.where(nearest < target, E4M3.decode(E4M3.encode(nearest) + 1), nearest)


class SharedExponent(Enum):
    """How a block's power of two follows from its amax (names as in torchao, cuBLAS and the OCP specification).

    - UP: the smallest 2^k >= amax / format.max; nothing saturates (torchao's RCEIL; TransformerEngine's rule);
    - FLOOR: 2^(floor(log2 amax) - floor(log2 format.max)), the OCP specification's minimum; the largest elements may
      saturate;
    - CEIL: 2^(ceil(log2 amax) - floor(log2 format.max));
    - EVEN: FLOOR of amax rounded to the format's mantissa.
    """

    UP = "up"
    FLOOR = "floor"
    CEIL = "ceil"
    EVEN = "even"


@dataclass(frozen=True)
class Microscaling:
    """A power of two a block, stored in E8M0            (OCP Microscaling Formats 1.0, sec. 5.1 and 6.3)

    A block of zeros has 2^-127. NaN or an infinity in a block makes its scale NaN.

    Args:
        exponent: the rule.
    """

    stored: ClassVar[Format | None] = E8M0
    exponent: SharedExponent = SharedExponent.UP

    def __call__(self, x: Tensor, dims: tuple[int, ...], fmt: Format) -> Scales:
        """Return the scale, extent 1 along `dims`."""
        amax = x.abs().amax(dims, keepdim=True)
        top = math.frexp(fmt.max)[1] - 1  # floor(log2 format.max)
        bits = amax.view(torch.int32)
        if self.exponent is SharedExponent.EVEN:
            bits = bits + (1 << (22 - _mantissa_bits(fmt)))
        if self.exponent is SharedExponent.UP:
            bits, top = quotient(amax, fmt.max).view(torch.int32), 0
        exponent = bits >> 23
        if self.exponent is SharedExponent.UP:  # 2^-127 is the middle of the subnormals, exponent 0 holds both halves
            exponent = exponent + ((bits & MANTISSA) > torch.where(exponent == 0, 1 << 22, 0))
        if self.exponent is SharedExponent.CEIL:
            exponent = exponent + ((bits & MANTISSA) > 0)
        biased = (exponent - top).clamp(0, 254)
        scale, encode = _two_to(biased), _two_to(254 - biased)
        return Scales(torch.where(amax.isfinite(), scale, torch.nan), encode=encode)


def _two_to(biased: Tensor) -> Tensor:
    """2^(biased - 127), float32; the lowest one is a subnormal."""
    return torch.where(biased == 0, 1 << 22, biased << 23).to(torch.int32).view(torch.float32)


def _mantissa_bits(fmt: Format) -> int:
    """Bits behind the leading one of the largest numbers of a format."""
    bits = getattr(fmt, "mantissa_bits", None)
    return bits if isinstance(bits, int) else fmt.bits - 2
