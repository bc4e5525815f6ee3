# SPDX-License-Identifier: Apache-2.0
"""Spread outliers over their neighbours before rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowbits.errors import SpecError
from lowbits.quantizers._noise import Noise

# The vector of signs in TransformerEngine and torchtitan (NVIDIA 2025, arXiv:2509.25149, sec. 4.2 asks for one vector
# that all layers share, and does not print it).
NVFP4_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


@dataclass(frozen=True)
class Hadamard:
    """Rotate every `size` consecutive elements along the contraction by a randomised Hadamard matrix.

        y = (x * d) H / sqrt(size),   H symmetric with entries +-1 (Sylvester's),   d = signs

    The matrix is orthonormal: applied to both operands of a GEMM along its contraction it cancels. Any length works:
    the last group is filled up with zeros, and the result is that much longer. Sums are taken in the order of the fast
    transform, log2(size) times a sum and a difference of float32, so that every device gives the same bits.

    Args:
        size: a power of two.
        signs: d, `size` numbers 1 or -1; None means no signs. `random` draws them.
        dtype: the result is rounded to it: torch.float32, or torch.bfloat16 as NVFP4's recipe does before it looks for
            amaxes.
    Raises:
        SpecError: the size is not a power of two, the signs are not `size` signs, or another dtype.
    """

    size: int = 16
    signs: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.size < 2 or self.size & (self.size - 1):
            raise SpecError(f"Hadamard({self.size}): the size is a power of two, at least 2.")
        if self.signs is not None and (len(self.signs) != self.size or set(self.signs) - {1, -1}):
            raise SpecError(f"Hadamard({self.size}): signs are {self.size} numbers 1 or -1, got {self.signs}.")
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise SpecError(f"Hadamard({self.size}): dtype is torch.float32 or torch.bfloat16, got {self.dtype}.")

    @classmethod
    def random(cls, size: int, seed: int, dtype: torch.dtype = torch.float32) -> Hadamard:
        """Return a transform with random signs.

        Args:
            size: a power of two.
            seed: of the signs.
            dtype: the result is rounded to it.
        """
        bits = Noise.of(seed, "hadamard", "signs").bits((size,), 0)
        return cls(size, tuple(1 - 2 * int(bit & 1) for bit in bits), dtype)

    def padded(self, extent: int) -> int:
        """Return the length of the result for `extent` elements."""
        return extent + -extent % self.size

    def forward(self, x: Tensor) -> Tensor:
        """Return the transform of `x` along its last axis, float32 [..., padded K]."""
        groups = pad(x.float(), (0, -x.shape[-1] % self.size)).unflatten(-1, (-1, self.size))
        y = self._butterfly(groups * self._diagonal(x.device)) * self.size**-0.5
        return (_to_bfloat16(y) if self.dtype is torch.bfloat16 else y).flatten(-2)

    def inverse(self, y: Tensor) -> Tensor:
        """Undo `forward` up to rounding, float32; what filled `x` up comes back as numbers near 0."""
        groups = y.float().unflatten(-1, (-1, self.size))
        return (self._butterfly(groups) * self.size**-0.5 * self._diagonal(y.device)).flatten(-2)

    def _butterfly(self, x: Tensor) -> Tensor:
        half = 1
        while half < self.size:
            pairs = x.unflatten(-1, (-1, 2, half))
            first, second = pairs[..., 0, :], pairs[..., 1, :]
            x = torch.stack((first + second, first - second), -2).flatten(-3)
            half *= 2
        return x

    def _diagonal(self, device: torch.device) -> Tensor:
        signs = (1,) * self.size if self.signs is None else self.signs
        return torch.tensor(signs, dtype=torch.float32, device=device)


def _to_bfloat16(y: Tensor) -> Tensor:
    """Round float32 to bfloat16, ties to even, and keep it as float32.

    By bits: inductor (torch 2.11 to 2.13) drops a cast down and up again as if it did not round.
    """
    bits = y.view(torch.int32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return torch.where(y.isnan(), y, rounded.view(torch.float32))
