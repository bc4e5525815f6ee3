# SPDX-License-Identifier: Apache-2.0
"""Say what numbers a few bits can hold.

A format is data. `code_values` is its definition, code by code, in plain Python; everything else is
derived from it or tested against it. All formats share four verbs:

    project(x)      float32 -> the nearest (or a stochastic) neighbour on the grid, saturating
    encode(values)  grid values -> codes, the integers that are stored
    decode(codes)   codes -> float32
    values()        the grid itself, float64, ascending
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lowbits.errors import FormatError


class Format(ABC):
    """A finite set of numbers and the codes that stand for them.

    Attributes:
        name: how the format is written in tables, logs and exports.
        bits: width of a code.
    """

    name: str
    bits: int

    @cached_property
    @abstractmethod
    def code_values(self) -> tuple[float, ...]:
        """The value of every code, in code order; NaN and infinities where the format has them."""

    @abstractmethod
    def project(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Round `x` to the grid.

        Args:
            x: float32, any shape. Values beyond the grid saturate to its ends, infinities too; NaN stays NaN.
            noise: None rounds to nearest, ties to the even code. A float32 tensor of x's shape, uniform in
                [0, 1), rounds stochastically: up with probability (x - lower) / (upper - lower).
        Returns:
            float32 values on the grid, x's shape.
        """

    @abstractmethod
    def encode(self, values: Tensor) -> Tensor:
        """Return the codes (uint8, or int32 above 8 bits) of values on the grid.

        NaN becomes the format's NaN code; in a format without one it becomes code 0, since a quantized tensor
        carries NaN in its scale.
        """

    def decode(self, codes: Tensor) -> Tensor:
        """Return the float32 values of `codes`, the inverse of `encode`."""
        table = torch.tensor(self.code_values, dtype=torch.float32, device=codes.device)
        return table[codes.to(torch.int64)]

    def values(self) -> Tensor:
        """Return the finite values, float64, ascending, each once (-0 and +0 are one)."""
        return torch.tensor(sorted({v + 0.0 for v in self.code_values if math.isfinite(v)}), dtype=torch.float64)

    @property
    def max(self) -> float:
        """The largest finite value."""
        mantissa, exponent = self._ends[1]
        return mantissa * 2.0**exponent

    @property
    def min(self) -> float:
        """The lowest finite value."""
        mantissa, exponent = self._ends[0]
        return mantissa * 2.0**exponent

    @cached_property
    def _ends(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(mantissa, exponent) of min and max as ints.

        torch.compile takes ints that hang on a module as constants, but floats as inputs once they differ between two
        compiled layers, and cannot pass those into an autograd function (torch 2.11 to 2.13).
        """
        finite = [math.frexp(v) for v in (self.values()[0].item(), self.values()[-1].item())]
        low, high = ((int(m * 2**53), e - 53) for m, e in finite)
        return low, high

    @cached_property
    def has_zero(self) -> bool:
        """Whether zero is on the grid."""
        return 0.0 in self.code_values

    @cached_property
    def has_nan(self) -> bool:
        """Whether a code stands for NaN."""
        return any(math.isnan(v) for v in self.code_values)

    @cached_property
    def smallest(self) -> float:
        """The smallest positive value."""
        return min(v for v in self.code_values if v > 0.0)

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype that `encode` returns."""
        return torch.uint8 if self.bits <= 8 else torch.int32

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class IntFormat(Format):
    """Integers in two's complement.

    Args:
        name: for example `int8`.
        bits: 1 to 8.
        signed: [-2^(b-1), 2^(b-1) - 1], else [0, 2^b - 1].
        lowest: False drops the lowest code: signed grids become symmetric (int2 becomes ternary), unsigned
            grids lose zero.
    Raises:
        FormatError: the width is out of range, or nothing but zero would be left.
    """

    name: str
    bits: int
    signed: bool = True
    lowest: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise FormatError(f"{self.name}: an integer format has 1 to 8 bits, got {self.bits}.")
        if self.signed and self.bits == 1:
            raise FormatError(
                f"{self.name}: one signed bit holds -1 and 0 only and has no positive value to scale by. "
                "Use Codebook('binary', (-1.0, 1.0)) or an unsigned format."
            )
        if self.bits == 1 and not self.lowest:
            raise FormatError(f"{self.name}: one bit without its lowest code holds one number. Keep lowest=True.")

    @cached_property
    def code_values(self) -> tuple[float, ...]:
        """Two's complement; the dropped lowest code reads as its neighbour, so that no code is undefined."""
        half = 1 << (self.bits - 1) if self.signed else 0
        low = (0 if not self.signed else -half) + (0 if self.lowest else 1)
        plain = [c - 2 * half if self.signed and c >= half else c for c in range(1 << self.bits)]
        return tuple(float(max(v, low)) for v in plain)

    def project(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """See `Format.project`."""
        x = x.clamp(self.min, self.max)
        if noise is None:
            return torch.round(x)
        lower = torch.floor(x)
        return lower + (noise < x - lower)

    def encode(self, values: Tensor) -> Tensor:
        """See `Format.encode`."""
        return (torch.nan_to_num(values, nan=0.0).to(torch.int32) & ((1 << self.bits) - 1)).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """See `Format.decode`; by arithmetic, so that no table is gathered from."""
        plain = codes.to(torch.int32)
        if self.signed:
            half = 1 << (self.bits - 1)
            plain = (plain ^ half) - half
        return plain.to(torch.float32).clamp_min(self.min)


@dataclass(frozen=True)
class FloatFormat(Format):
    """A sign, an exponent and a mantissa.

        value = (-1)^s 2^(e - bias) (1 + f / 2^m)   for e > 0,   (-1)^s 2^(1 - bias) f / 2^m   for e = 0

    Args:
        name: for example `e4m3`.
        exponent_bits: width of e.
        mantissa_bits: width m of f.
        bias: subtracted from e.
        top_codes_lost: how many of the largest magnitudes are not numbers: 0 (OCP FP4, FP6), 1 (E4M3, E8M0: the
            last one is NaN), 2^m (IEEE: infinity, then NaN).
        signed: has a sign bit.
        subnormals: e = 0 means a subnormal; False makes it an ordinary exponent (E8M0, which has no zero).
        only_zero_is_zero: a number other than 0 is never rounded to 0 but to the smallest of its sign.
    Raises:
        FormatError: the parts do not make a format of 1 to 16 bits.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    top_codes_lost: int = 0
    signed: bool = True
    subnormals: bool = True
    only_zero_is_zero: bool = False

    def __post_init__(self) -> None:
        if self.exponent_bits < 1 or self.mantissa_bits < 0 or not 1 <= self.bits <= 16 or self.exponent_bits > 8:
            raise FormatError(
                f"{self.name}: needs 1 to 8 exponent bits, mantissa bits >= 0 and 16 bits at most, got "
                f"e{self.exponent_bits}m{self.mantissa_bits}."
            )
        if not 0 <= self.top_codes_lost < 1 << (self.exponent_bits + self.mantissa_bits):
            raise FormatError(f"{self.name}: top_codes_lost={self.top_codes_lost} leaves no number.")

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Width of a code: sign, exponent and mantissa."""
        return int(self.signed) + self.exponent_bits + self.mantissa_bits

    @cached_property
    def code_values(self) -> tuple[float, ...]:
        """The formula above for every code."""
        magnitudes = 1 << (self.exponent_bits + self.mantissa_bits)
        positive = [self._magnitude(c) for c in range(magnitudes)]
        return tuple(positive + [math.copysign(v, -1.0) for v in positive] if self.signed else positive)

    def _magnitude(self, code: int) -> float:
        lost = code - ((1 << (self.exponent_bits + self.mantissa_bits)) - self.top_codes_lost)
        if lost >= 0:
            return math.inf if lost == 0 and self.top_codes_lost > 1 else math.nan
        exponent, fraction = divmod(code, 1 << self.mantissa_bits)
        if exponent == 0 and self.subnormals:
            return math.ldexp(fraction, 1 - self.bias - self.mantissa_bits)
        return math.ldexp((1 << self.mantissa_bits) + fraction, exponent - self.bias - self.mantissa_bits)

    @property
    def min_normal_exponent(self) -> int:
        """The exponent of the smallest normal value."""
        return (1 if self.subnormals else 0) - self.bias

    def _wide(self) -> tuple[torch.dtype, torch.dtype, int, int]:
        """The float to round in, its integer twin, mantissa width and bias.

        float32 unless the format reaches as far down as float32 itself (BF16, E8M0): there its subnormals would
        need a path of their own.
        """
        if self.exponent_bits < 8:
            return torch.float32, torch.int32, 23, 127
        return torch.float64, torch.int64, 52, 1023

    def project(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """See `Format.project`. Rounds the bit pattern, so it is exact and never leaves the grid."""
        wide, integer, width, _ = self._wide()
        magnitude = (x.abs() if self.signed else x).to(wide).clamp(0.0 if self.signed else self.min, self.max)
        shift = width - self.mantissa_bits
        bits = magnitude.view(integer)
        below = magnitude * 2.0 ** (self.mantissa_bits - self.min_normal_exponent)  # in units of the subnormal step
        if noise is None:
            up = (1 << (shift - 1)) - 1 + ((bits >> shift) & 1)
            normal = ((bits + up) >> shift) << shift
            subnormal = torch.round(below)
        else:
            fraction = (bits & ((1 << shift) - 1)).to(wide) * 2.0**-shift
            normal = ((bits >> shift) + (noise < fraction).to(integer)) << shift
            floor = torch.floor(below)
            subnormal = floor + (noise < below - floor)
        is_subnormal = magnitude < 2.0**self.min_normal_exponent
        step = 2.0 ** (self.min_normal_exponent - self.mantissa_bits)
        rounded = torch.where(is_subnormal, subnormal * step, normal.view(wide)).to(torch.float32)
        if self.only_zero_is_zero:
            rounded = torch.where(magnitude > 0, rounded.clamp_min(self.smallest), rounded)
        return torch.where(x.isnan(), x, torch.copysign(rounded, x) if self.signed else rounded)

    def encode(self, values: Tensor) -> Tensor:
        """See `Format.encode`."""
        wide, integer, width, bias = self._wide()
        magnitude = values.abs().to(wide)
        normal = (magnitude.view(integer) >> (width - self.mantissa_bits)) - ((bias - self.bias) << self.mantissa_bits)
        below = (magnitude * 2.0 ** (self.mantissa_bits - self.min_normal_exponent)).to(integer)
        codes = torch.where(magnitude < 2.0**self.min_normal_exponent, below, normal)
        top = (1 << (self.exponent_bits + self.mantissa_bits)) - 1
        if self.signed:
            codes = codes | (torch.signbit(values).to(integer) << (self.bits - 1))
        # Devices differ in the sign of the NaN that they make.
        return torch.where(values.isnan(), top if self.has_nan else 0, codes).to(self.code_dtype)


@dataclass(frozen=True)
class Codebook(Format):
    """Any ascending list of numbers; a code is an index into it.

    Args:
        name: for example `nf4`.
        points: 2 to 256 numbers, strictly ascending, the last one positive.
        only_zero_is_zero: a positive number is never rounded to 0 but to the smallest positive point.
    Raises:
        FormatError: the points are too few, too many or out of order.
    """

    name: str
    points: tuple[float, ...]
    only_zero_is_zero: bool = False

    def __post_init__(self) -> None:
        ordered = all(a < b for a, b in zip(self.points, self.points[1:], strict=False))
        if not 2 <= len(self.points) <= 256 or not ordered or self.points[-1] <= 0:
            raise FormatError(
                f"{self.name}: a codebook has 2 to 256 strictly ascending points and a positive last one, "
                f"got {len(self.points)} points."
            )
        _ = self.boundaries  # now and kept: the lock in Python 3.11's cached_property would break a compiled graph

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Width of an index."""
        return max(1, math.ceil(math.log2(len(self.points))))

    @cached_property
    def code_values(self) -> tuple[float, ...]:
        """The points as float32 can hold them; codes beyond the last point read as the last point."""
        exact = torch.tensor(self.points, dtype=torch.float32).tolist()
        return tuple(exact + [exact[-1]] * ((1 << self.bits) - len(exact)))

    def _points(self, device: torch.device) -> Tensor:
        return torch.tensor(self.code_values[: len(self.points)], dtype=torch.float32, device=device)

    @cached_property
    def boundaries(self) -> tuple[float, ...]:
        """The largest float32 that is rounded to each point but the last one: one search then finds the nearest."""
        points = torch.tensor(self.code_values[: len(self.points)], dtype=torch.float64)
        middle = (points[1:] + points[:-1]) / 2
        bound = middle.float()
        odd = torch.arange(len(middle)) % 2 == 1
        beyond = (bound.double() > middle) | ((bound.double() == middle) & odd)  # a tie goes to the even index
        bound = torch.where(beyond, torch.nextafter(bound, torch.tensor(-math.inf)), bound)
        if self.only_zero_is_zero:
            bound = torch.where(points[:-1] == 0, 0.0, bound)
        return tuple(bound.tolist())

    def project(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """See `Format.project`. Ties go to the even index."""
        points = self._points(x.device)
        if noise is None:
            bounds = torch.tensor(self.boundaries, dtype=torch.float32, device=x.device)
            rounded = points[torch.searchsorted(bounds, x.contiguous())]
        else:
            index = (torch.searchsorted(points, x.contiguous(), right=True) - 1).clamp(0, len(self.points) - 2)
            lower, upper = points[index].double(), points[index + 1].double()
            fraction = (x.clamp(self.min, self.max).double() - lower) / (upper - lower)
            rounded = torch.where(noise < fraction, upper, lower).to(torch.float32)
            if self.only_zero_is_zero:
                rounded = torch.where((x > 0) & (rounded == 0), self.smallest, rounded)
        return torch.where(x.isnan(), x, rounded)

    def encode(self, values: Tensor) -> Tensor:
        """See `Format.encode`."""
        found = torch.searchsorted(self._points(values.device), torch.nan_to_num(values, nan=0.0).contiguous())
        return found.clamp_max(len(self.points) - 1).to(torch.uint8)
