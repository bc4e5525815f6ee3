# SPDX-License-Identifier: Apache-2.0
"""Turn a group of numbers into the scale that maps it onto a format.

    x ~ outer * scale * (q + zero_point)

Only decode scales exist. Everything is float32 arithmetic, each operation rounded once, so that any device gives the
same bits. Conventions shared by all rules of this file (`_block_scales` has those of NVFP4 and MX):

- a group of zeros gets scale 1, or the smallest normal number where the format has no zero;
- a scale below the smallest normal float32 is raised to it, so that subnormal inputs neither divide by zero nor
  depend on a device's flush-to-zero;
- NaN or an infinity in a group gives a NaN scale, so that the whole group decodes to NaN: what is not finite is
  propagated, never hidden, and survives packing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lowbits.formats import Format

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
MANTISSA = (1 << 23) - 1


class Scales(NamedTuple):
    """What a rule makes of a tensor.

    Args:
        scale: float32, extent 1 where elements share it.
        zero_point: integers as float32, likewise; None for 0.
        outer: float32, one scale of the whole tensor on top, of the rank of `scale`; None for 1.
        encode: what x is multiplied by, where published arithmetic does not divide by `scale`; None divides.
    """

    scale: Tensor
    zero_point: Tensor | None = None
    outer: Tensor | None = None
    encode: Tensor | None = None


@dataclass(frozen=True)
class Amax:
    """scale = max(amax |x|, floor) / format.max                                      (linear quantization, sec. 3)

    Args:
        floor: lower bound of amax. 0 is right; published code uses 1e-5 (weights, activations), 1e-9 (gradients) and
            1e-8 (optimizer states), of which the last erases small second moments.
    """

    stored: ClassVar[Format | None] = None
    floor: float = 0.0

    def __call__(self, x: Tensor, dims: tuple[int, ...], fmt: Format) -> Scales:
        """Return the scale, extent 1 along `dims`."""
        return Scales(_guard(_amax(x, dims, self.floor), fmt.max, fmt))


@dataclass(frozen=True)
class PowerOfTwo:
    """scale = 2^ceil(log2(amax |x| / format.max)): the smallest power of two with which nothing saturates."""

    stored: ClassVar[Format | None] = None
    floor: float = 0.0

    def __call__(self, x: Tensor, dims: tuple[int, ...], fmt: Format) -> Scales:
        """Return the scale, extent 1 along `dims`."""
        scale = _guard(_amax(x, dims, self.floor), fmt.max, fmt)
        bits = scale.view(torch.int32)
        up = ((bits + MANTISSA) & ~MANTISSA).view(torch.float32)  # a carry out of any mantissa raises the exponent
        return Scales(torch.where(scale.isfinite(), up, scale))


@dataclass(frozen=True)
class ReciprocalAmax:
    """q = x s,  s = format.max / max(amax |x|, floor),  x ~ (1 / s) q                       (torchao's FP8 recipes)

    The quotient is taken in float64 and rounded to float32, as torchao does; the codes are its codes. Where the scale
    is constant along the contraction, a GEMM applies it to the float32 sums and multiplies the codes themselves.

    Args:
        floor: lower bound of amax.
    """

    stored: ClassVar[Format | None] = None
    floor: float = 1e-12

    def __call__(self, x: Tensor, dims: tuple[int, ...], fmt: Format) -> Scales:
        """Return the scale and what x is multiplied by, extent 1 along `dims`."""
        amax = x.abs().amax(dims, keepdim=True)
        encode = (fmt.max / amax.double().clamp_min(self.floor)).float()
        encode = torch.where(amax.isfinite(), encode, torch.nan)
        return Scales(1 / encode, encode=encode)


@dataclass(frozen=True)
class AbsMean:
    """scale = max(mean |x|, floor)                      (BitNet b1.58, Ma et al. 2024, arXiv:2402.17764, eq. 1 to 3)"""

    stored: ClassVar[Format | None] = None
    floor: float = 0.0

    def __call__(self, x: Tensor, dims: tuple[int, ...], fmt: Format) -> Scales:
        """Return the scale, extent 1 along `dims`."""
        return Scales(_guard(x.abs().mean(dims, keepdim=True).clamp_min(self.floor), 1.0, fmt))


@dataclass(frozen=True)
class Asymmetric:
    """scale = (max - min) / (format.max - format.min), zero_point = round(min / scale - format.min)

    The range always includes 0, so that zeros stay zeros and a constant tensor keeps its value.
    """

    stored: ClassVar[Format | None] = None

    def __call__(self, x: Tensor, dims: tuple[int, ...], fmt: Format) -> Scales:
        """Return scale and zero point, extent 1 along `dims`."""
        low, high = x.amin(dims, keepdim=True).clamp_max(0.0), x.amax(dims, keepdim=True).clamp_min(0.0)
        scale = _guard(high - low, fmt.max - fmt.min, fmt)
        return Scales(scale, torch.round(low / scale - fmt.min))


@dataclass(frozen=True)
class StudyAsymmetric:
    """scale = max(max - min, floor) / (2 format.max), zero_point = round(min / scale - format.min)

    The form in the published study's code (Chitsaz et al. 2024, arXiv:2407.11722): the divisor is one code too small,
    so the two top codes are never used, and 0 need not be on the grid. Here to reproduce; use `Asymmetric` otherwise.
    """

    stored: ClassVar[Format | None] = None
    floor: float = 1e-5

    def __call__(self, x: Tensor, dims: tuple[int, ...], fmt: Format) -> Scales:
        """Return scale and zero point, extent 1 along `dims`."""
        low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
        scale = _guard((high - low).clamp_min(self.floor), 2 * fmt.max, fmt)
        return Scales(scale, torch.round(low / scale - fmt.min))


def quotient(numerator: Tensor | float, denominator: Tensor | float) -> Tensor:
    """Return numerator / denominator, one of them a tensor, in float32 and rounded once on every device.

    torch multiplies by a reciprocal instead, which rounds twice: number / tensor everywhere, tensor / number on CUDA.
    In float64 the error of that is 2^-52, and the quotient of two float32 numbers is either where float32 changes its
    rounding or 2^-49 away from there.
    """
    numerator = numerator.double() if isinstance(numerator, Tensor) else numerator
    denominator = denominator.double() if isinstance(denominator, Tensor) else denominator
    return torch.as_tensor(numerator / denominator).float()


def _amax(x: Tensor, dims: tuple[int, ...], floor: float) -> Tensor:
    amax = x.abs().amax(dims, keepdim=True)
    return amax.clamp_min(floor) if floor else amax


def _guard(extent: Tensor, divisor: float, fmt: Format) -> Tensor:
    """extent / divisor, kept usable for groups of zeros and for subnormals; what is not finite becomes NaN."""
    empty = 1.0 if fmt.has_zero else SMALLEST_NORMAL
    scale = torch.where(extent == 0, empty, quotient(extent, divisor).clamp_min(SMALLEST_NORMAL))
    return torch.where(extent.isfinite(), scale, torch.nan)
