# SPDX-License-Identifier: Apache-2.0
"""Spread outliers over their neighbours before rounding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbits.errors import ShapeError, SpecError
from lowbits.quantizers._noise import Noise


@dataclass(frozen=True)
class Hadamard:
    """Rotate every `size` consecutive elements along the contraction by a randomised Hadamard matrix.

        y = (x * d) H / sqrt(size),   H symmetric with entries +-1,   d = random signs

    The matrix is orthonormal: applied to both operands of a GEMM along its contraction it cancels.

    Args:
        size: a power of two that divides the contraction.
        seed: of the signs d; None means no signs.
    Raises:
        SpecError: the size is not a power of two.
    """

    size: int = 16
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.size < 2 or self.size & (self.size - 1):
            raise SpecError(f"Hadamard({self.size}): the size is a power of two, at least 2.")

    def matrix(self, device: torch.device | str = "cpu") -> Tensor:
        """Return diag(d) H / sqrt(size), float32 [size, size]; `x_groups @ matrix` is the transform."""
        h = torch.ones(1, 1, device=device)
        while h.shape[0] < self.size:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
        if self.seed is not None:
            bits = Noise.of(self.seed, "hadamard", "signs").bits((self.size, 1), 0, device=device)
            h = h * (1 - 2 * (bits & 1))
        return h * self.size**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """Return the transform of `x`, float32, along its last axis."""
        return self._apply(x, self.matrix(x.device))

    def inverse(self, y: Tensor) -> Tensor:
        """Undo `forward`, up to float32 rounding."""
        return self._apply(y, self.matrix(y.device).t())

    def _apply(self, x: Tensor, matrix: Tensor) -> Tensor:
        if x.shape[-1] % self.size:
            raise ShapeError(
                f"Hadamard({self.size}) needs the last axis to be divisible by {self.size}, got {x.shape[-1]}. "
                "Leave the layer out in `choose`, or take a smaller size."
            )
        return (x.unflatten(-1, (-1, self.size)) @ matrix).flatten(-2)
