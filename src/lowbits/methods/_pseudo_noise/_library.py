# SPDX-License-Identifier: Apache-2.0
"""DiffQ as its library has it: noise relative to the range of the whole weight, bits a group, size as a penalty.

    b  = b_min + (b_max - b_min) sigmoid(l)                       a learned l for every group of consecutive weights
    W^ = W + R (max W - min W) / (2^b - 1)                        R normal (Z / 2) or uniform
    size = sum_groups (g b + bits of the table of b) + 72 a weight, in MB

In evaluation W^ is W on a grid of 2^round(b) levels from min W to max W. Defossez, Adi and Synnaeve 2021,
arXiv:2104.09987, and version 0.2.4 of the library, read for its formulas; nothing of its code is here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lowbits.errors import ShapeError
from lowbits.methods._pseudo_noise._draw import PseudoNoise
from lowbits.methods._pseudo_noise._numerics import Plan
from lowbits.methods._pseudo_noise._weight import ROLE, numbers
from lowbits.quantizers import Noise

_BITS_A_MB = 2**20 * 8
_BOUNDS_AND_WIDTH = 2 * 32 + 8  # min and max of a weight, and how many bits an entry of the table of bits has


class LibraryNoise(nn.Module):
    """See a weight as DiffQ's library does.

    Attributes:
        logit: float32 [groups].
        counter: int64 [3], number of the draw and key.

    Args:
        weight: as it is stored.
        noise: `normal` or `uniform`.
        group: consecutive weights that share their bits.
        bits: smallest, largest, and the number at first, strictly between.
        seed: of the run.
        name: of the layer.
    Raises:
        ShapeError: groups do not divide the weight.
    """

    counter: Tensor

    def __init__(
        self, weight: Tensor, noise: PseudoNoise, group: int, bits: tuple[float, float, float], *, seed: int, name: str
    ) -> None:
        super().__init__()
        if weight.numel() % group:
            raise ShapeError(
                f"{name}: groups of {group} do not divide its {weight.numel()} weights. Take a size that divides."
            )
        # The blocks of the plan are the counters'; they have nothing to do with the groups.
        self.noise, self.group, self.range, self._text = noise, group, bits[:2], Plan(noise=noise).text
        share = (bits[2] - bits[0]) / (bits[1] - bits[0])
        self.logit = nn.Parameter(torch.full((weight.numel() // group,), math.log(share / (1 - share))))
        self.register_buffer("counter", torch.tensor([0, *Noise.of(seed, name, ROLE).key]), persistent=False)

    def forward(self, w: Tensor) -> Tensor:
        """Return W^: noise in training, the grid in evaluation."""
        if not self.training:
            return self.quantized(w)
        flat = w.reshape(-1, self.group)
        r = numbers(self.counter, self._text, w.shape).view(flat.shape)
        step = (flat.max() - flat.min()) / (2 ** self.bits().unsqueeze(1) - 1)
        return (flat + step * r).view(w.shape)

    def bits(self) -> Tensor:
        """Return b of every group, differentiable."""
        low, high = self.range
        return low + (high - low) * torch.sigmoid(self.logit)

    @torch.no_grad()
    def quantized(self, w: Tensor) -> Tensor:
        """Return W on its grids, bits rounded to integers."""
        flat = w.detach().reshape(-1, self.group)
        low, high = flat.min(), flat.max()
        levels = 2 ** self.bits().round().clamp(1, 15).unsqueeze(1) - 1
        grid = ((flat - low) / (high - low) * levels).round() / levels * (high - low) + low
        return torch.where(high > low, grid, flat).view(w.shape)

    def size(self) -> Tensor:
        """Return the size of the weight in MB as its export would have it, differentiable."""
        return self._size(self.bits())

    @torch.no_grad()
    def true_size(self) -> float:
        """Return the size in MB with the bits rounded."""
        return float(self._size(self.bits().round().clamp(1, 15)))

    def _size(self, bits: Tensor) -> Tensor:
        # From the bounds, not from the largest b of now: that would wait for the device at every step.
        table = math.ceil(math.log2(1 + self.range[1] - self.range[0]))
        return (self.group * bits.sum() + _BOUNDS_AND_WIDTH + table * bits.numel()) / _BITS_A_MB

    def extra_repr(self) -> str:
        """Show what is done."""
        return f"{self.noise.value}, groups of {self.group}, {self.range[0]:g} to {self.range[1]:g} bits"
