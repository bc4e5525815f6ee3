# SPDX-License-Identifier: Apache-2.0
"""An operand in the bytes that integer and FP8 units multiply."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowbits.formats import E4M3, E5M2, Format, IntFormat
from lowbits.quantizers import (
    AbsMean,
    Amax,
    PerGroup,
    PerRow,
    PerTensor,
    PerTile,
    PowerOfTwo,
    QTensor,
    QuantSpec,
    ReciprocalAmax,
)

FLOAT8: dict[Format, torch.dtype] = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
BLOCK = 128
"""Elements a scale, along the contraction, where units apply scales of blocks."""
ALIGNED = 16  # bytes: what tensor cores take the contraction in


@dataclass(frozen=True)
class Coded:
    """An operand as tensor cores multiply it:  x ~ scale * codes, in the spec's basis.

    Args:
        codes: [R, K], K filled up with zeros to a multiple of 16: int8 or an FP8, contiguous.
        scale: float32 [R, 1], or [1, 1] for one of the whole tensor; [R, K / 128] for groups of 128 along K, and
            [R / 128, K / 128] for tiles, both rounded up.
        spec: how it was made.
        length: K without what fills it up.
    """

    codes: Tensor
    scale: Tensor
    spec: QuantSpec
    length: int

    @classmethod
    def of(cls, q: QTensor) -> Coded:
        """Return the definition's tensor in bytes.

        Args:
            q: of a matrix, whose spec `why_not_coded` has nothing against.
        """
        filled = pad(q.values, (0, -q.values.shape[1] % ALIGNED))
        integers = isinstance(q.spec.format, IntFormat)
        # NaN in a tensor of integers sits in its scale.
        codes = filled.nan_to_num().to(torch.int8) if integers else filled.to(FLOAT8[q.spec.format])
        return cls(codes.contiguous(), as_matrix(q.scale, q.spec).contiguous(), q.spec, q.length)

    def quantized(self) -> QTensor:
        """Return the definition's tensor of these bytes; in rows whose scale is NaN its values may be others."""
        values = self.codes[:, : self.spec.padded((self.length,))[0]].float()
        scale = self.scale
        match self.spec.granularity:
            case PerGroup():
                scale = scale[..., None]
            case PerTile():
                scale = scale[:, None, :, None]
        return QTensor(values, scale, self.spec, self.length)

    def dequantize(self) -> Tensor:
        """Return the approximation of x, float32, in x's own basis and shape; the definition's numbers."""
        return self.quantized().dequantize()


def as_matrix(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Return the scales of a matrix, which have the rank of the granularity's view, as those of `Coded`.

    Args:
        scale: of a `QTensor` or `PackedTensor`.
        spec: its.
    """
    match spec.granularity:
        case PerGroup():
            return scale[..., 0]
        case PerTile():
            return scale[:, 0, :, 0]
    return scale


def of_blocks(spec: QuantSpec) -> bool:
    """Return whether scales change every 128 elements along the contraction, as FP8 units with block scales have it.

    Args:
        spec: of an operand.
    """
    return spec.granularity in (PerGroup(BLOCK), PerTile(BLOCK, BLOCK))


def why_not_coded(spec: QuantSpec | None) -> str | None:
    """Say why an operand cannot be multiplied by integer or FP8 units; None if it can.

    Args:
        spec: how it is quantized, None for high precision.
    """
    if spec is None:
        return "an operand is in high precision"
    blocks = of_blocks(spec) and spec.format in FLOAT8
    if not isinstance(spec.granularity, PerTensor | PerRow) and not blocks:
        return f"the scales of `{spec}` vary along the contraction"
    if spec.scale.stored is not None:
        return f"the scales of `{spec}` are themselves in 8 bits, which needs units for block scales"
    if not isinstance(spec.scale, Amax | PowerOfTwo | ReciprocalAmax | AbsMean):
        return f"`{spec}` has a zero point"
    if isinstance(spec.format, IntFormat) and spec.format.max > 127:
        return f"`{spec}` does not fit signed 8-bit operands"
    return None


def _kind(spec: QuantSpec) -> str:
    return type(spec.granularity).__name__.removeprefix("Per").lower()


def illegal_on_hardware(lhs: QuantSpec | None, rhs: QuantSpec | None) -> str | None:
    """Say why a GEMM of these operands cannot run on integer or FP8 units; None if it can.

    Args:
        lhs: how the left operand is quantized, None for high precision.
        rhs: the right operand's.
    """
    reason = why_not_coded(lhs) or why_not_coded(rhs)
    if reason is not None or lhs is None or rhs is None:
        return reason
    if lhs.transform != rhs.transform:
        return "the operands are rotated differently"
    if of_blocks(lhs) != of_blocks(rhs) or isinstance(lhs.granularity, PerTile):
        return f"there is no unit for {_kind(lhs)} x {_kind(rhs)} scales"
    integers = [isinstance(spec.format, IntFormat) for spec in (lhs, rhs)]
    if all(integers) or all(spec.format in FLOAT8 for spec in (lhs, rhs)):
        return None
    return f"there is no unit for {lhs.format.name} x {rhs.format.name}"
