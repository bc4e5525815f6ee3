# SPDX-License-Identifier: Apache-2.0
"""Quantize a tensor, and keep it in few bits.

`QTensor` holds grid values as float32, which is what arithmetic wants; `PackedTensor` holds codes as bytes, which is
what memory wants. Both are plain data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from lowbits.errors import ShapeError, SpecError
from lowbits.formats import Format, IntFormat, pack, unpack
from lowbits.quantizers._granularity import Granularity, PerBlock, PerTensor
from lowbits.quantizers._scale import AbsMean, Amax, Asymmetric, ScaleRule, StudyAsymmetric
from lowbits.quantizers._transform import Hadamard


class Rounding(Enum):
    """How a value between two grid points is rounded."""

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"


@dataclass(frozen=True)
class QuantSpec:
    """Say how one operand becomes few bits.

    Args:
        format: the grid.
        granularity: which elements share a scale.
        scale: the rule from a group to its scale.
        rounding: nearest-even, or stochastic (then `quantize` takes noise).
        transform: applied along the contraction before anything else; both operands of a GEMM need the same one.
    Raises:
        SpecError: the parts contradict each other.
    """

    format: Format
    granularity: Granularity = PerTensor()
    scale: ScaleRule = Amax()
    rounding: Rounding = Rounding.NEAREST
    transform: Hadamard | None = None

    def __post_init__(self) -> None:
        if isinstance(self.scale, Asymmetric | StudyAsymmetric) and not isinstance(self.format, IntFormat):
            raise SpecError(f"{self.scale}: a zero point needs an integer format, got {self.format.name}.")
        if isinstance(self.granularity, PerBlock) and isinstance(self.scale, AbsMean | StudyAsymmetric):
            raise SpecError(
                f"{self.scale} with {self.granularity}: the zeros that fill the last block would count. "
                "Use PerGroup or Amax()."
            )

        # Computed now and kept: the lock in Python 3.11's cached_property would break a compiled graph.
        _ = self.format.max, self.format.has_zero, self.format.has_nan

    def __str__(self) -> str:
        parts = [self.format.name, _words(self.granularity)]
        if self.scale != Amax():
            parts.append(_words(self.scale))
        if self.rounding is Rounding.STOCHASTIC:
            parts.append("stochastic")
        if self.transform is not None:
            parts.append(f"hadamard {self.transform.size}")
        return " ".join(parts)


@dataclass(frozen=True)
class QTensor:
    """A tensor on a grid:  x ~ scale * (values + zero_point).

    Args:
        values: float32 on the format's grid, in the shape of x (after the transform).
        scale: float32, the rank of the granularity's view, extent 1 where elements share it.
        spec: how it was made.
        zero_point: integers as float32, scale's shape, or None.
    """

    values: Tensor
    scale: Tensor
    spec: QuantSpec
    zero_point: Tensor | None = None

    def rotated(self) -> Tensor:
        """Return scale * (values + zero_point), float32, still in the transform's basis."""
        view, _ = self.spec.granularity.view(self.values)
        if self.zero_point is not None:
            view = view + self.zero_point
        return _restore(view * self.scale, self.values)

    def dequantize(self) -> Tensor:
        """Return the approximation of x, float32, in x's own basis."""
        x_hat = self.rotated()
        return x_hat if self.spec.transform is None else self.spec.transform.inverse(x_hat)

    def pack(self) -> PackedTensor:
        """Return the same tensor with its codes as bytes."""
        codes = self.spec.format.encode(self.values)
        codes = pack(codes, _stored_bits(self.spec.format)) if codes.dtype == torch.uint8 else codes.reshape(-1)
        return PackedTensor(codes, self.scale, self.spec, tuple(self.values.shape), self.zero_point)


@dataclass(frozen=True)
class PackedTensor:
    """A `QTensor` whose codes are really stored in few bits.

    Args:
        codes: uint8 bytes (int32 above 8 bits), see `lowbits.formats.pack`; widths without a packed layout take a byte.
        scale: as in `QTensor`.
        spec: as in `QTensor`.
        shape: of the values.
        zero_point: as in `QTensor`.
    """

    codes: Tensor
    scale: Tensor
    spec: QuantSpec
    shape: tuple[int, ...]
    zero_point: Tensor | None = None

    def unpack(self) -> QTensor:
        """Return the `QTensor` that `pack` was called on, bit for bit."""
        codes = self.codes
        if codes.dtype == torch.uint8:
            codes = unpack(codes, _stored_bits(self.spec.format), math.prod(self.shape))
        values = self.spec.format.decode(codes).view(self.shape)
        return QTensor(values, self.scale, self.spec, self.zero_point)

    def nbytes(self) -> int:
        """Return the bytes of codes, scales and zero points, as allocated."""
        parts = [self.codes, self.scale] + ([] if self.zero_point is None else [self.zero_point])
        return sum(part.untyped_storage().nbytes() for part in parts)


def quantize(x: Tensor, spec: QuantSpec, noise: Tensor | None = None) -> QTensor:
    """Round `x` to few bits.

        q = project(x / scale - zero_point)         (nearest-even, or stochastic with `noise`)

    Arithmetic is float32 whatever x's dtype. NaN and infinities make every element of their group NaN (see
    `lowbits.quantizers._scale`). Not differentiable: callers put it inside an autograd function.

    Args:
        x: floating point, [..., K], not empty.
        spec: what to round to.
        noise: for stochastic rounding, float32 of x's shape, uniform in [0, 1); see `Noise.uniform`.
    Returns:
        A `QTensor` of x's shape.
    Raises:
        SpecError: noise is missing or not wanted, or x is not floating point.
        ShapeError: x is empty or does not fit the granularity.

    >>> quantize(torch.tensor([[1.0, -3.5, 0.2]]), QuantSpec(IntFormat("int4", 4))).values
    tensor([[ 2., -7.,  0.]])
    """
    _check(x, spec, noise)
    x = x.float()
    if spec.transform is not None:
        x = spec.transform.forward(x)
    view, dims = spec.granularity.view(x)
    scale, zero_point = spec.scale(view, dims, spec.format)
    target = view / scale
    if zero_point is not None:
        target = target - zero_point
    grid_noise = None if noise is None else spec.granularity.view(noise)[0]
    values = spec.format.project(target, grid_noise)
    return QTensor(_restore(values, x), scale, spec, zero_point)


def _check(x: Tensor, spec: QuantSpec, noise: Tensor | None) -> None:
    if not x.is_floating_point():
        raise SpecError(f"quantize takes floating point, got {x.dtype}.")
    if x.numel() == 0:
        raise ShapeError(f"quantize needs at least one element, got shape {tuple(x.shape)}.")
    if (spec.rounding is Rounding.STOCHASTIC) != (noise is not None):
        raise SpecError(f"{spec}: stochastic rounding takes noise, nearest takes none; noise is {noise is not None}.")
    if noise is not None and noise.shape != x.shape:
        raise ShapeError(f"{spec}: noise has shape {tuple(noise.shape)}, x has {tuple(x.shape)}.")


def _restore(view: Tensor, like: Tensor) -> Tensor:
    """Undo a granularity's view; `PerBlock` may have filled up its last block."""
    if view.numel() != like.numel():
        view = view.reshape(-1)[: like.numel()]
    return view.reshape(like.shape)


def _stored_bits(fmt: Format) -> float:
    """The packed width: ternary takes five codes a byte, widths without a layout take the next one that has."""
    if fmt.bits == 2 and len(fmt.values()) == 3:
        return 1.6
    return next(width for width in (1, 2, 4, 8) if width >= fmt.bits)


def _words(part: object) -> str:
    """`PerGroup(size=16)` -> `group 16`, for tables and `extra_repr`."""
    name = type(part).__name__.removeprefix("Per").lower()
    sizes = [str(v) for v in vars(part).values() if v]
    return " ".join([name, "x".join(sizes)]) if sizes else name
