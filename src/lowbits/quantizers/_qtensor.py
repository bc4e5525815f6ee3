# SPDX-License-Identifier: Apache-2.0
"""Quantize a tensor, and keep it in few bits.

`QTensor` holds grid values as float32, which is what arithmetic wants; `PackedTensor` holds codes as bytes, which is
what memory wants. Both are plain data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from lowbits.errors import ShapeError, SpecError
from lowbits.formats import Format, IntFormat, pack, unpack
from lowbits.quantizers._block_scales import Microscaling, TwoLevel
from lowbits.quantizers._granularity import Granularity, PerBlock, PerRow, PerTensor, restore
from lowbits.quantizers._noise import Noise
from lowbits.quantizers._scale import AbsMean, Amax, Asymmetric, PowerOfTwo, ReciprocalAmax, StudyAsymmetric
from lowbits.quantizers._transform import Hadamard

ScaleRule = Amax | PowerOfTwo | ReciprocalAmax | AbsMean | Asymmetric | StudyAsymmetric | TwoLevel | Microscaling


class Rounding(Enum):
    """How a value between two grid points is rounded.

    - STOCHASTIC: up with the probability of its position between them, to 24 bits;
    - STOCHASTIC_8BIT: with 8 random bits, centred: u = (k + 1/2) / 256. Four times fewer random numbers, no bias;
    - STOCHASTIC_8BIT_FLOOR: u = k / 256, as Blackwell's instruction and TransformerEngine round: towards zero by
      0.0019 of a step on average.
    """

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"
    STOCHASTIC_8BIT = "stochastic 8 bit"
    STOCHASTIC_8BIT_FLOOR = "stochastic 8 bit floor"


@dataclass(frozen=True)
class QuantSpec:
    """Say how one operand becomes few bits.

    Args:
        format: the grid.
        granularity: which elements share a scale.
        scale: the rule from a group to its scale.
        rounding: nearest-even, or stochastic (then `quantize` takes noise).
        transform: applied along the contraction before anything else; both operands of a GEMM need the same one.

    Attributes:
        floor_told: the scale's floor in words: a compiler may take the number for one that changes, and then has no
            text of it.

    Raises:
        SpecError: the parts contradict each other.
    """

    format: Format
    granularity: Granularity = PerTensor()
    scale: ScaleRule = Amax()
    rounding: Rounding = Rounding.NEAREST
    transform: Hadamard | None = None
    floor_told: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.scale, Asymmetric | StudyAsymmetric) and not isinstance(self.format, IntFormat):
            raise SpecError(f"{self.scale}: a zero point needs an integer format, got {self.format.name}.")
        if isinstance(self.scale, TwoLevel | Microscaling) and self.format.min != -self.format.max:
            raise SpecError(f"{self.scale}: the format is symmetric about 0, got {self.format.name}.")
        if isinstance(self.granularity, PerBlock) and isinstance(self.scale, AbsMean | StudyAsymmetric):
            raise SpecError(
                f"{self.scale} with {self.granularity}: the zeros that fill the last block would count. "
                "Use PerGroup or Amax()."
            )

        # Computed now and kept: the lock in Python 3.11's cached_property would break a compiled graph.
        _ = self.format.max, self.format.has_zero, self.format.has_nan
        object.__setattr__(self, "floor_told", repr(float(getattr(self.scale, "floor", 0.0))))

    def __str__(self) -> str:
        parts = [self.format.name, _words(self.granularity)]
        if self.scale != Amax():
            parts.append(_words(self.scale))
        if self.rounding is not Rounding.NEAREST:
            parts.append(self.rounding.value)
        if self.transform is not None:
            signs = "" if self.transform.signs else " without signs"
            parts.append(f"hadamard {self.transform.size}{signs}")
        return " ".join(parts)

    def padded(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the values of a tensor of `shape`, which a transform fills up to its size."""
        if self.transform is None:
            return tuple(shape)
        return (*shape[:-1], self.transform.padded(shape[-1]))

    def draw(
        self, noise: Noise, shape: Sequence[int], step: int | Tensor, *, device: torch.device | str = "cpu"
    ) -> Tensor | None:
        """Draw what `quantize` takes as noise for a tensor of `shape`; None for nearest.

        Args:
            noise: the stream.
            shape: of the tensor that is quantized.
            step: which draw.
            device: of the result.
        """
        shape = self.padded(shape)
        match self.rounding:
            case Rounding.NEAREST:
                return None
            case Rounding.STOCHASTIC:
                return noise.uniform(shape, step, device=device)
            case Rounding.STOCHASTIC_8BIT:
                return (noise.bits8(shape, step, device=device).float() + 0.5) * 2.0**-8
            case Rounding.STOCHASTIC_8BIT_FLOOR:
                # A grid's neighbour is taken where noise < fraction, published code where k / 256 >= 1 - fraction: so
                # noise is the float32 below (k + 1) / 256.
                return (noise.bits8(shape, step, device=device).float() + 1) * 2.0**-8 * (1 - 2.0**-24)


@dataclass(frozen=True)
class QTensor:
    """A tensor on a grid:  x ~ outer * scale * (values + zero_point).

    Args:
        values: float32 on the format's grid, in x's shape; with a transform, in its basis and filled up to its size.
        scale: float32, the rank of the granularity's view, extent 1 where elements share it.
        spec: how it was made.
        length: of x's last axis.
        zero_point: integers as float32, scale's shape, or None.
        outer: float32, one scale of the whole tensor on top, scale's rank, or None.
    """

    values: Tensor
    scale: Tensor
    spec: QuantSpec
    length: int
    zero_point: Tensor | None = None
    outer: Tensor | None = None

    def rotated(self) -> Tensor:
        """Return outer * scale * (values + zero_point), float32, still in the transform's basis."""
        inner, outer = self.factors()
        return inner if outer is None else inner * outer

    def factors(self) -> tuple[Tensor, Tensor | None]:
        """Return what a GEMM multiplies and what stays outside of its sums: x ~ inner * outer, in the spec's basis.

        The scale of a whole tensor above blocks stays outside, and the scales of `ReciprocalAmax` that are constant
        along the contraction; what is left inside is exact in bfloat16 for such specs.

        Returns:
            inner, float32 in the shape of the values, and outer, float32 [rows, 1] or [1, 1], or None.
        """
        if isinstance(self.spec.scale, ReciprocalAmax) and isinstance(self.spec.granularity, PerTensor | PerRow):
            return self.values, self.scale
        view, _ = self.spec.granularity.view(self.values)
        if self.zero_point is not None:
            view = view + self.zero_point
        inner = restore(view * self.scale, self.values, self.spec.granularity)
        if self.outer is None:
            return inner, None
        outer = self.outer.view([1] * self.values.ndim)
        exact = isinstance(self.spec.scale, TwoLevel) and self.spec.scale.power_of_two
        return (inner * outer, None) if exact else (inner, outer)

    def dequantize(self) -> Tensor:
        """Return the approximation of x, float32, in x's own basis and shape."""
        x_hat = self.rotated()
        return x_hat if self.spec.transform is None else self.spec.transform.inverse(x_hat)[..., : self.length]

    def pack(self) -> PackedTensor:
        """Return the same tensor with its codes as bytes, and its scales where the rule stores them in 8 bits."""
        codes = self.spec.format.encode(self.values)
        codes = pack(codes, _stored_bits(self.spec.format)) if codes.dtype == torch.uint8 else codes.reshape(-1)
        stored = self.spec.scale.stored
        scale = self.scale if stored is None else stored.encode(self.scale)
        shape = (*self.values.shape[:-1], self.length)
        return PackedTensor(codes, scale, self.spec, shape, self.zero_point, self.outer)


@dataclass(frozen=True)
class PackedTensor:
    """A `QTensor` whose codes are really stored in few bits.

    Args:
        codes: uint8 bytes (int32 above 8 bits), see `lowbits.formats.pack`; widths without a packed layout take a byte.
        scale: as in `QTensor`; uint8 codes of `spec.scale.stored` where that is a format.
        spec: as in `QTensor`.
        shape: of x.
        zero_point: as in `QTensor`.
        outer: as in `QTensor`.
    """

    codes: Tensor
    scale: Tensor
    spec: QuantSpec
    shape: tuple[int, ...]
    zero_point: Tensor | None = None
    outer: Tensor | None = None

    def unpack(self) -> QTensor:
        """Return the `QTensor` that `pack` was called on, bit for bit."""
        codes, padded = self.codes, self.spec.padded(self.shape)
        if codes.dtype == torch.uint8:
            codes = unpack(codes, _stored_bits(self.spec.format), math.prod(padded))
        values = self.spec.format.decode(codes).view(padded)
        stored = self.spec.scale.stored
        scale = self.scale if stored is None else stored.decode(self.scale)
        return QTensor(values, scale, self.spec, self.shape[-1], self.zero_point, self.outer)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return codes, scale, zero point and outer scale: all that is not in `spec` and `shape`."""
        return self.codes, self.scale, self.zero_point, self.outer

    def nbytes(self) -> int:
        """Return the bytes of codes, scales and zero points, as allocated."""
        return sum(part.untyped_storage().nbytes() for part in self.tensors() if part is not None)


def quantize(x: Tensor, spec: QuantSpec, noise: Tensor | None = None) -> QTensor:
    """Round `x` to few bits.

        q = project(x / scale - zero_point)         (nearest-even, or stochastic with `noise`)

    Arithmetic is float32 whatever x's dtype. NaN and infinities make every element of their group NaN (see the scale
    rules). Any shape works; what fills up the last group never counts. Not differentiable: callers put it inside an
    autograd function.

    Args:
        x: floating point, [..., K], not empty.
        spec: what to round to.
        noise: for stochastic rounding, float32 of the shape `spec.padded(x.shape)`, uniform in [0, 1); see
            `QuantSpec.draw`.
    Returns:
        A `QTensor` of x's shape.
    Raises:
        SpecError: noise is missing or not wanted, or x is not floating point.
        ShapeError: x is empty or does not fit the granularity.

    >>> quantize(torch.tensor([[1.0, -3.5, 0.2]]), QuantSpec(IntFormat("int4", 4))).values
    tensor([[ 2., -7.,  0.]])
    """
    _check(x, spec, noise)
    length = x.shape[-1] if x.ndim else 1
    x = x.float()
    if spec.transform is not None:
        x = spec.transform.forward(x)
    view, dims = spec.granularity.view(x)
    if isinstance(spec.scale, AbsMean | StudyAsymmetric) and view.numel() != x.numel():
        raise ShapeError(
            f"{spec}: the zeros that fill up {tuple(x.shape)} would count in its scales. Take Amax(), or a size that "
            "divides."
        )
    scale, zero_point, outer, encode = spec.scale(view, dims, spec.format)
    target = view / scale if encode is None else view * encode
    if zero_point is not None:
        target = target - zero_point
    grid_noise = None if noise is None else spec.granularity.view(noise)[0]
    values = spec.format.project(target, grid_noise)
    return QTensor(restore(values, x, spec.granularity), scale, spec, length, zero_point, outer)


def _check(x: Tensor, spec: QuantSpec, noise: Tensor | None) -> None:
    if not x.is_floating_point():
        raise SpecError(f"quantize takes floating point, got {x.dtype}.")
    if x.numel() == 0:
        raise ShapeError(f"quantize needs at least one element, got shape {tuple(x.shape)}.")
    if (spec.rounding is Rounding.NEAREST) != (noise is None):
        raise SpecError(f"{spec}: stochastic rounding takes noise, nearest takes none; noise is {noise is not None}.")
    if noise is not None and noise.shape != spec.padded(x.shape):
        raise ShapeError(f"{spec}: noise has shape {tuple(noise.shape)}, x has {spec.padded(x.shape)}.")


def _stored_bits(fmt: Format) -> float:
    """The packed width: ternary takes five codes a byte, widths without a layout take the next one that has."""
    if fmt.bits == 2 and len(fmt.values()) == 3:
        return 1.6
    return next(width for width in (1, 2, 4, 8) if width >= fmt.bits)


def _words(part: object) -> str:
    """`PerGroup(size=16)` -> `group 16`, `TwoLevel(power_of_two=True)` -> `two level power of two`; defaults unsaid."""
    name = re.sub(r"(?<!^)(?=[A-Z])", " ", type(part).__name__.removeprefix("Per")).lower()
    told = {f: v for f, v in vars(part).items() if v != getattr(type(part), f, None)}
    numbers = [str(v) for v in told.values() if not isinstance(v, Enum | bool)]
    choices = [str(v.value) for v in told.values() if isinstance(v, Enum)]
    flags = [f.replace("_", " ") for f, v in told.items() if v is True]
    return " ".join([name, *(["x".join(numbers)] if numbers else []), *choices, *flags])
