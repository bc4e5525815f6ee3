# SPDX-License-Identifier: Apache-2.0
"""Draw the noise of a weight block by block, as a pure function of seed, layer, draw, block and element.

    Philox4x32-10, key = Noise.of(seed, layer, role), counter = (call, block row, block column, draw)

The coordinates are those of the block in the whole weight: a shard, a recomputed activation, a replayed graph and a
resumed run draw the same. Elements of a block are numbered row by row. Rounded normal: group g of 32 elements takes the
words of the calls g C .. (g + 1) C - 1, element j of it their bit j. Uniform and normal: the calls give halves of
words, the lower first, one an element.
"""

from __future__ import annotations

from enum import Enum
from functools import cache

import torch
from torch import Tensor

from lowbits.methods._pseudo_noise._blocks import Block
from lowbits.methods._pseudo_noise._circuit import LANES, Fidelity, rounded_normal
from lowbits.quantizers import philox

_LOW = 0xFFFFFFFF
_HALVES = 8  # of a call's four words
NORMAL_POINTS = 1 << 15


class PseudoNoise(Enum):
    """The distribution of R.

    `rounded_normal` is round(Z / 2) of GaussWS, `uniform` U(-1/2, 1/2) and `normal` Z / 2 are DiffQ's, in steps of
    2^-16 of the probability; `none` adds nothing.
    """

    ROUNDED_NORMAL = "rounded_normal"
    UNIFORM = "uniform"
    NORMAL = "normal"
    NONE = "none"

    def variance(self, fidelity: Fidelity) -> float:
        """E[R^2]."""
        known = {"rounded_normal": fidelity.variance, "uniform": 1 / 12, "normal": 1 / 4, "none": 0.0}
        return known[self.value]


@cache
def half_normal(device: torch.device) -> Tensor:
    """Return the quantiles of |Z| / 2 at (i + 1/2) / 2^15, float32 [2^15]; a normal number is one, and a sign."""
    places = (torch.arange(NORMAL_POINTS, dtype=torch.float64) + 0.5) / (2 * NORMAL_POINTS) + 0.5
    return (torch.special.ndtri(places) / 2).float().to(device)


def draw(
    noise: PseudoNoise,
    fidelity: Fidelity,
    counts: tuple[int, int],
    block: Block,
    counter: Tensor,
    origin: Block = (0, 0),
) -> Tensor:
    """Return R of every element of every block.

    Args:
        noise: its distribution.
        fidelity: of the rounded normal.
        counts: blocks down and across.
        block: rows and columns of a block.
        counter: int64 [3]: number of the draw, and the two words of the key.
        origin: row and column, in blocks, of the first block in the whole weight.
    Returns:
        float32 [down, across, rows x columns].
    """
    size = block[0] * block[1]
    if noise is PseudoNoise.NONE:
        return torch.zeros(*counts, size, device=counter.device)
    if noise is PseudoNoise.ROUNDED_NORMAL:
        groups, calls = -(-size // LANES), fidelity.calls
        words = _words(groups * calls, counts, counter, origin).unflatten(2, (groups, calls * 4))
        return rounded_normal(words.unbind(-1), fidelity).flatten(2)[..., :size].to(torch.float32)
    words = _words(-(-size // _HALVES), counts, counter, origin)
    halves = torch.stack((words & 0xFFFF, words >> 16), -1).flatten(2)[..., :size]
    if noise is PseudoNoise.UNIFORM:
        return (halves.to(torch.float32) + 0.5) * 2.0**-16 - 0.5
    magnitude = half_normal(counter.device)[halves & (NORMAL_POINTS - 1)]
    return torch.where(halves >= NORMAL_POINTS, -magnitude, magnitude)


def _words(calls: int, counts: tuple[int, int], counter: Tensor, origin: Block) -> Tensor:
    """Four words a call, int64 [down, across, 4 calls]."""
    device = counter.device
    call = torch.arange(calls, dtype=torch.int64, device=device)
    row = origin[0] + torch.arange(counts[0], dtype=torch.int64, device=device).view(-1, 1, 1)
    column = origin[1] + torch.arange(counts[1], dtype=torch.int64, device=device).view(1, -1, 1)
    shape = torch.broadcast_shapes(call.shape, row.shape, column.shape)
    words = philox((call.expand(shape), row, column, counter[0] & _LOW), (counter[1], counter[2]))
    return torch.stack(words, -1).flatten(2)
