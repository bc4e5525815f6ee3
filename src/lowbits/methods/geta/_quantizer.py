# SPDX-License-Identifier: Apache-2.0
"""The parameterised quantizer: step, range and exponent are trained, the bit width follows from them."""

from __future__ import annotations

import enum
import math
from typing import Any

import torch
from torch import Tensor, nn

from lowbits.errors import SpecError
from lowbits.kernels import as_dtype
from lowbits.methods.geta import _launch

FINEST = 24.0
"""Bits beyond which no step may go: the float32 mantissa holds no more."""
SMALLEST_RANGE = 1e-4
EXPONENTS = (0.5, 2.0)
HIDING = 2.0**-40


class Slope(enum.Enum):
    """The gradient that x gets inside the range."""

    ONE = enum.auto()
    """Straight through, as published."""
    MAPPED = enum.auto()
    """t |x|^(t-1), the derivative of the mapping before the rounding."""


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:  # type: ignore[override]
        (step, limit, exponent), (ctx.slope, ctx.share) = rest[:3], rest[3:]
        ctx.save_for_backward(x, step, limit, exponent)
        if _launch.launchable(x, step, limit, exponent):
            return _launch.quantize(x, step, limit, exponent)
        value = _wide(x, step)
        magnitude = torch.minimum(value.abs(), limit).pow(exponent)
        return as_dtype(value.sign() * (torch.round(magnitude / step) * step), x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, step, limit, exponent = ctx.saved_tensors
        if _launch.launchable(x, step, limit, exponent):
            scalars = step, limit, exponent
            d_x, sums = _launch.gradients(x, g, scalars, ctx.share, ctx.slope is Slope.MAPPED)
            return d_x, *sums.unbind(), None, None
        value, g = _wide(x, step), _wide(g, step)
        size = value.abs()
        inside, clipped = size < limit, torch.minimum(size, limit)
        c = clipped.pow(exponent)
        signed = g * value.sign()
        residual = torch.round(c / step) - c / step
        d_step = (signed * residual).sum().to(step.dtype)
        d_limit = (signed * ~inside).sum().to(step.dtype) * exponent * limit.pow(exponent - 1)
        d_exponent = (signed * torch.xlogy(c, clipped)).sum().to(step.dtype)
        d_x = g * inside
        if ctx.slope is Slope.MAPPED:
            d_x = d_x * torch.where(inside & (size > 0), exponent * clipped.pow(exponent - 1), 1.0)
        return d_x.to(x.dtype), *(d * ctx.share for d in (d_step, d_limit, d_exponent)), None, None


def _wide(x: Tensor, scalar: Tensor) -> Tensor:
    """Return a tensor of halves in the scalars' precision: torch would compute with a scalar in that of the tensor."""
    return x.to(scalar.dtype) if x.element_size() < scalar.element_size() else x


def quantize(x: Tensor, step: Tensor, limit: Tensor, exponent: Tensor, slope: Slope = Slope.ONE) -> Tensor:
    """Round in the mapped domain, with gradients for x and for the three scalars.

        c(x) = min(|x|, q_m)^t,   x^Q = sgn(x) d round(c / d)          (arXiv:2502.16638, sec. 3; half to even)
        dx^Q/dd = sgn(x) R,  R = round(c/d) - c/d;  dx^Q/dq_m = sgn(x) t q_m^(t-1) where |x| >= q_m, else 0;
        dx^Q/dt = sgn(x) c ln min(|x|, q_m);  dx^Q/dx = 1 where |x| < q_m, else 0

    Args:
        x: float, any shape; half-precision x is quantized in float32 and returned in its own dtype.
        step: d > 0, scalar.
        limit: q_m > 0, scalar.
        exponent: t > 0, scalar.
        slope: gradient of x inside the range.
    Returns:
        Values d k with integer k, x's shape and dtype.

    >>> quantize(torch.tensor([-0.3, 0.6, 9.0]), *(torch.tensor(v) for v in (0.5, 2.0, 1.0)))
    tensor([-0.5000,  0.5000,  2.0000])
    """
    return _Quantize.apply(x, step, limit, exponent, slope, 1.0)  # type: ignore[return-value]


def bits_of(step: Tensor, limit: Tensor, exponent: Tensor) -> Tensor:
    """Return the bit width, b = log2(q_m^t / d + 1) + 1, real-valued.

    Args:
        step: d, any shape.
        limit: q_m, same shape.
        exponent: t, same shape.
    """
    return torch.log2(limit.pow(exponent) / step + 1) + 1


def step_of(bits: Tensor | float, limit: Tensor, exponent: Tensor) -> Tensor:
    """Return the step at which a quantizer has a bit width, d = q_m^t / (2^(b-1) - 1).

    Args:
        bits: b > 1.
        limit: q_m.
        exponent: t.
    """
    codes = (bits - 1).exp2() - 1 if isinstance(bits, Tensor) else 2.0 ** (bits - 1) - 1
    return limit.pow(exponent) / codes


class Quantizer(nn.Module):
    """Hold step, range and exponent of one tensor, and quantize it.

    Args:
        limit: q_m at the start, the largest magnitude that the tensor has.
        bits: width at the start.
        slope: gradient of x inside the range.
    """

    def __init__(self, limit: float = 1.0, bits: float = 16.0, slope: Slope = Slope.ONE) -> None:
        super().__init__()
        if not (math.isfinite(limit) and 1 < bits <= FINEST):
            raise SpecError(
                f"Quantizer: range {limit} and {bits} bits; the range must be finite, the bits 1 to {FINEST:g}."
            )
        self.slope, self.share = slope, 1.0
        self.limit = nn.Parameter(torch.tensor(max(float(limit), SMALLEST_RANGE)))
        self.exponent = nn.Parameter(torch.tensor(1.0))
        self.step = nn.Parameter(step_of(bits, self.limit.detach(), self.exponent.detach()))

    def forward(self, x: Tensor) -> Tensor:
        """Return x on the quantizer's grid."""
        return _Quantize.apply(x, self.step, self.limit, self.exponent, self.slope, self.share)  # type: ignore[return-value]

    @property
    def bits(self) -> Tensor:
        """The bit width, a scalar tensor."""
        return bits_of(self.step.detach(), self.limit.detach(), self.exponent.detach())

    def hide_gradients_(self) -> None:
        """Scale the scalars' gradients by 2^-40: beside them a global norm is that of the weights alone."""
        self.share = HIDING

    @torch.no_grad()
    def set_bits_(self, bits: float) -> None:
        """Choose the step that gives a bit width."""
        self.step.copy_(step_of(bits, self.limit, self.exponent))

    @torch.no_grad()
    def set_range_(self, limit: float, bits: float) -> None:
        """Choose range and width, and make the mapping linear."""
        self.limit.fill_(max(limit, SMALLEST_RANGE))
        self.exponent.fill_(1.0)
        self.set_bits_(bits)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Return the integers k of x^Q = d k, int32; within 2^(b-1) - 1 of 0 for b bits."""
        on_grid = self(_wide(x, self.step))  # a power computed twice in two ways could round to two neighbours
        return torch.round(on_grid / self.step).to(torch.int32)

    def extra_repr(self) -> str:
        """Say the width."""
        return f"bits={float(self.bits):.3g}" if self.step.device.type != "meta" else ""
