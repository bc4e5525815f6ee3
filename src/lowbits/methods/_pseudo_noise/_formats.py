# SPDX-License-Identifier: Apache-2.0
"""The formats that a noisy weight is cast to, and what a format can hold of the noise.

A format with m mantissa bits keeps a unit of noise D = M 2^(1 - b) of a weight near the block's largest number M if
D is at least half a unit in the last place: b <= m + 2 (a tie at equality). Read the other way, a block that was
trained with b bits needs m >= b - 2: 3 bits fit FP4, 4 FP6, 5 FP8, 9 FP12 or BF16.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from lowbits.formats import BF16, E2M1, E2M3, E3M2, E4M3, FloatFormat

E3M4 = FloatFormat("e3m4", 3, 4, bias=3)
E4M7 = FloatFormat("e4m7", 4, 7, bias=7)
_SMALLEST_EXPONENT = -100  # of a block's scale; what is smaller underflows in every operator anyway


class Operator(Enum):
    """The format of the GEMM's operand."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"

    @property
    def mantissa_bits(self) -> int:
        """Stored bits of the significand."""
        return {"bf16": 7, "fp16": 10, "fp32": 23}[self.value]

    @property
    def dtype(self) -> torch.dtype:
        """As torch has it."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.value]


class Storage(Enum):
    """A format of few bits to which the noisy weight is cast before the operator sees it, one scale a block."""

    NONE = "none"
    E2M1 = "e2m1"
    E3M2 = "e3m2"
    E2M3 = "e2m3"
    E4M3 = "e4m3"
    E3M4 = "e3m4"
    E4M7 = "e4m7"

    @property
    def format(self) -> FloatFormat | None:
        """Its numbers; None for `none`."""
        return {f.name: f for f in (E2M1, E3M2, E2M3, E4M3, E3M4, E4M7)}.get(self.value)


LADDER: tuple[FloatFormat, ...] = (E2M1, E3M2, E4M3, E3M4, E4M7, BF16)
"""What an exported block can be stored in, the smallest first, as published; BF16 has no scale."""
SMALLEST_LADDER: tuple[FloatFormat, ...] = (E2M1, E3M2, E2M3, E3M4, E4M7, BF16)
"""The same with 6 bits for b_t = 5: E2M3 has E4M3's mantissa, and steps down to half a unit of noise."""
BY_NAME: dict[str, FloatFormat] = {fmt.name: fmt for fmt in (*LADDER, *SMALLEST_LADDER)}


def rung(bits: float, ladder: tuple[FloatFormat, ...] = LADDER) -> FloatFormat:
    """Return the smallest format that holds a block which was trained with `bits` bits: m >= bits - 2.

    Args:
        bits: b_t; what no format of the ladder holds gets the last one.
        ladder: formats, the smallest first.

    >>> [rung(b).name for b in (3, 4, 4.01, 6, 9, 12)]
    ['e2m1', 'e3m2', 'e4m3', 'e3m4', 'e4m7', 'bf16']
    """
    fitting = (f for f in ladder if f.mantissa_bits >= bits - 2)
    return next(fitting, ladder[-1])


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 2^exponent, exactly, for exponents of normal numbers.

    Args:
        exponent: integers.
        dtype: float32 or float64.
    """
    if dtype == torch.float64:
        return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def top_exponent(fmt: FloatFormat) -> int:
    """Return floor(log2 max) of a format: its top binade."""
    return int(torch.frexp(torch.tensor(fmt.max)).exponent) - 1


def block_exponent(amax: Tensor) -> Tensor:
    """Return floor(log2 amax), int32, at least -100."""
    exponent = torch.frexp(amax).exponent - 1
    return torch.where(amax > 0, exponent, _SMALLEST_EXPONENT).clamp(min=_SMALLEST_EXPONENT)


def to_grid(x: Tensor, amax: Tensor, fmt: FloatFormat) -> tuple[Tensor, Tensor]:
    """Put blocks on the grid of a format whose top binade is that of the block's largest number.

        q = project(x 2^-n),   n = floor(log2 amax) - floor(log2 max)

    A power of two moves no bit; what lies above the format's largest number saturates. This is the scale rule of the
    OCP Microscaling formats, for blocks of any shape.

    Args:
        x: float32 or float64 [..., elements].
        amax: [...], what the scale is for.
        fmt: the format.
    Returns:
        q, and n as int32 [...].
    """
    n = block_exponent(amax) - top_exponent(fmt)
    return fmt.project(x * power_of_two(-n, x.dtype).unsqueeze(-1)), n


def block_cast(x: Tensor, amax: Tensor, fmt: FloatFormat) -> Tensor:
    """Return x as blocks of `fmt` hold it: q 2^n of `to_grid`."""
    if fmt == BF16:
        return x.to(torch.bfloat16).to(x.dtype)
    q, n = to_grid(x, amax, fmt)
    return q.to(x.dtype) * power_of_two(n, x.dtype).unsqueeze(-1)
