# SPDX-License-Identifier: Apache-2.0
"""Weights that exist on a grid alone: which codes there are, how they lie in bytes, how a value becomes a code.

    W = D q,    q an integer in [low, high],    D > 0 a stored step                    (arXiv:2412.04787, sec. 3)

Codes of a row (the last axis) are packed by themselves, so that a tensor can be cut between rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from lowbits.errors import FormatError, SpecError
from lowbits.formats import INT2, INT3, INT4, INT5, INT6, INT7, INT8, TERNARY, IntFormat
from lowbits.quantizers import Rounding

LARGEST_CHANGE = 256.0
"""In codes. A grid has at most 255 steps: a longer change ends where this one does."""


class Packing(Enum):
    """How many codes a byte holds; five are base-3 digits."""

    ONE = 1
    TWO = 2
    FOUR = 4
    FIVE = 5


class Scaling(Enum):
    """What becomes of the step D in training.

    - FIXED: it stays what it was at the start;
    - RECOMPUTED: as published, D <- D max(q) / high before every update, all codes rounded anew; it can only shrink.
      The published code takes the signed maximum too, but divides by it where it is 0 or negative; here D stays then.
    """

    FIXED = "fixed"
    RECOMPUTED = "recomputed"


_FORMATS = {8: INT8, 7: INT7, 6: INT6, 5: INT5, 4: INT4, 3: INT3, 2: INT2, 1.58: TERNARY}


@dataclass(frozen=True)
class Grid:
    """Say which codes a weight has, how they are stored, and how an update is rounded onto them.

    Args:
        format: of the codes, signed integers of at most 8 bits; INT2 is -2 .. 1, TERNARY is -1 .. 1.
        packing: None takes the densest that keeps codes within bit fields: 1, 2 or 4 a byte.
        rounding: of an updated weight: STOCHASTIC, or NEAREST, under which steps below half a code are lost.
        scaling: of the step.
    Raises:
        SpecError: the format does not fit, the packing does not hold it, or there is no such rounding of weights.

    >>> Grid.of(1.58)
    Grid(ternary, 4 a byte)
    """

    format: IntFormat
    packing: Packing | None = None
    rounding: Rounding = Rounding.STOCHASTIC
    scaling: Scaling = Scaling.FIXED

    def __post_init__(self) -> None:
        low, high = self.format.min, self.format.max
        if not -128 <= low < 0 < high <= 127:
            raise SpecError(f"Grid: codes are signed and fit a byte, {self.format.name} is {low:g} .. {high:g}.")
        if self.packing is None:
            object.__setattr__(self, "packing", _densest(self.format))
        most = 2 if self.packing is Packing.FIVE else 8 // self.per_byte
        if self.format.bits > most or (self.packing is Packing.FIVE and low < -1):
            raise SpecError(f"Grid: {self.per_byte} codes of {self.format.name} do not fit a byte. Leave packing out.")
        if self.rounding not in (Rounding.STOCHASTIC, Rounding.NEAREST):
            raise SpecError(f"Grid: weights are rounded stochastically to 24 bits or to nearest, got {self.rounding}.")

    def __repr__(self) -> str:
        rounding = "" if self.rounding is Rounding.STOCHASTIC else f", {self.rounding.value}"
        return f"Grid({self.format.name}, {self.per_byte} a byte{rounding})"

    @staticmethod
    def of(bits: float, packing: Packing | None = None, rounding: Rounding = Rounding.STOCHASTIC) -> Grid:
        """Return the grid of a width.

        Args:
            bits: 8, 7, 6, 5, 4, 3, 2, or 1.58 for ternary codes.
            packing: see `Grid`.
            rounding: see `Grid`.
        Raises:
            SpecError: another width.
        """
        if bits not in _FORMATS:
            raise SpecError(f"Grid: bits are one of {', '.join(map(str, _FORMATS))} (ternary), got {bits}.")
        return Grid(_FORMATS[bits], packing, rounding)

    @property
    def per_byte(self) -> int:
        """Codes in a byte."""
        assert self.packing is not None
        return self.packing.value

    @property
    def low(self) -> int:
        """The lowest code."""
        return int(self.format.min)

    @property
    def high(self) -> int:
        """The highest code."""
        return int(self.format.max)

    @property
    def dtype(self) -> torch.dtype:
        """Of stored codes."""
        return torch.int8 if self.per_byte == 1 else torch.uint8

    def row_bytes(self, length: int) -> int:
        """Return how many bytes a row of `length` codes takes."""
        return -(-length // self.per_byte)

    def pack(self, codes: Tensor) -> Tensor:
        """Return int8 codes [..., length] as they are stored, [..., row_bytes(length)].

        The first code of a byte sits in its lowest bits, in two's complement; base-3 digits are code + 1.
        """
        count = self.per_byte
        if count == 1:
            return codes
        padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % count)).unflatten(-1, (-1, count))
        bits = 8 // count
        total = torch.zeros(padded.shape[:-1], dtype=torch.uint8, device=codes.device)
        for place in range(count - 1, -1, -1):
            digit = padded[..., place]
            if self.packing is Packing.FIVE:
                total = total * 3 + (digit + 1).to(torch.uint8)
            else:
                total = (total << bits) | (digit.view(torch.uint8) & ((1 << bits) - 1))
        return total

    def unpack(self, stored: Tensor, length: int) -> Tensor:
        """Return stored codes as int8 [..., length]; the inverse of `pack`. No temporary is wider than a byte a code.

        Raises:
            FormatError: the rows have another number of bytes.
        """
        if stored.shape[-1:] != (self.row_bytes(length),):
            raise FormatError(
                f"{self}: a row of {length} codes takes {self.row_bytes(length)} bytes, got {tuple(stored.shape)}: the "
                "tensor was packed otherwise or is cut off."
            )
        count = self.per_byte
        if count == 1:
            return stored
        if self.packing is Packing.FIVE:
            digits = torch.stack([stored // 3**place % 3 for place in range(5)], -1)
            return (digits.flatten(-2)[..., :length].view(torch.int8) - 1).contiguous()
        bits = 8 // count
        fields = torch.stack([(stored >> (bits * place)) & ((1 << bits) - 1) for place in range(count)], -1)
        sign = 1 << (bits - 1)
        return ((fields.flatten(-2)[..., :length] ^ sign).view(torch.int8) - sign).contiguous()


def moved(codes: Tensor, change: Tensor, step: Tensor, grid: Grid, draw: Tensor | None) -> Tensor:
    """Return codes after an update of the weights that they stand for.

        d = change / D;   q <- clamp(q + floor(d) + [u < d - floor(d)], low, high)

    So E[q' - q] = change / D inside the range, a change of 0 moves nothing, and steps below a code count in
    proportion (SR of arXiv:2412.04787, eq. 4, of q + d: an integer plus a change is not rounded first).

    Args:
        codes: int8, any shape.
        change: float32, of the weights, same shape; where it is not finite the code stays: a grid has no NaN.
        step: D, float32, broadcast.
        grid: the codes that there are.
        draw: float32 in [0, 1), same shape; None rounds to nearest, halves to even.
    Returns:
        int8, same shape.
    """
    d = change * (1 / step)
    d = torch.where(d.isfinite(), d.clamp(-LARGEST_CHANGE, LARGEST_CHANGE), 0.0)
    if draw is None:
        whole = d.round()
    else:
        below = d.floor()
        whole = below + (draw < d - below)
    return (codes.to(torch.int32) + whole.to(torch.int32)).clamp(grid.low, grid.high).to(torch.int8)


def rounded(x: Tensor, grid: Grid, draw: Tensor | None) -> Tensor:
    """Return float32 x in units of a step, clamped to the range and rounded, as int8 codes (eq. 4 of the paper).

    Args:
        x: any shape; NaN becomes 0.
        grid: the codes that there are.
        draw: float32 in [0, 1), same shape; None rounds to nearest, halves to even.
    """
    x = x.nan_to_num(nan=0.0, posinf=LARGEST_CHANGE, neginf=-LARGEST_CHANGE).clamp(grid.low, grid.high)
    if draw is None:
        return x.round().to(torch.int8)
    below = x.floor()
    return (below + (draw < x - below)).to(torch.int8)


def _densest(fmt: IntFormat) -> Packing:
    return Packing.ONE if fmt.bits > 4 else Packing.TWO if fmt.bits > 2 else Packing.FOUR
