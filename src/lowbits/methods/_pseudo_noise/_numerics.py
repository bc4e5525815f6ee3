# SPDX-License-Identifier: Apache-2.0
"""Pseudo-quantization noise on a weight: the eager definition, forward and backward.

    M   = max |w| over a block
    b   = clamp(b_target + b_i (b_init - b_target), 2, m + 2)         one learnable number b_i a block, 1 at first
    D   = a M 2^(1 - b)                                                a = 1: the step of a symmetric b-bit integer grid
    W^  = cast(W + R D)

    dL/dW = G,   dL/db_i = -ln 2 (b_init - b_target) D sum_B(G R)      G = dL/dW^; 0 where b is at a bound

Ahn and Yoo 2025, arXiv:2505.11170, and the review of its successor; the path through M is dropped. Sums run in float64,
so that their order changes nothing that float32 shows.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from enum import Enum
from functools import cache

import torch
from torch import Tensor

from lowbits.errors import SpecError
from lowbits.methods._pseudo_noise._blocks import Block, counts, from_blocks, to_blocks
from lowbits.methods._pseudo_noise._circuit import Fidelity
from lowbits.methods._pseudo_noise._draw import PseudoNoise, draw
from lowbits.methods._pseudo_noise._formats import Operator, Storage, block_cast, power_of_two

FEWEST_BITS, _MOST_BITS = 2.0, 25.0  # of b; noise of more survives in no format, float32's 24 bits included
_LARGEST_SIDE = 1024  # of a block; partial ones are padded, so a larger one would take memory without end
# ln(2)^k / k!, k = 13 .. 0: 2^f for |f| <= 1/2 to the last bits of float64.
EXP2 = tuple(math.log(2) ** k / math.factorial(k) for k in range(13, -1, -1))


@dataclass(frozen=True)
class Plan:
    """What is done to a weight.

    Args:
        noise: distribution of R.
        fidelity: of the rounded normal.
        block: rows and columns of a block.
        b_init: bits at first.
        b_target: bits where b_i is 0.
        operator: what W^ is cast to.
        storage: a format of few bits before that.
        amplitude: a; 0.506 gives the rounded normal the variance of a rounding error.
        through_max: let the gradient pass through M, too, to the block's largest weight.
    Raises:
        SpecError: a number is out of its range.
    """

    noise: PseudoNoise = PseudoNoise.ROUNDED_NORMAL
    fidelity: Fidelity = Fidelity.DEFAULT
    block: Block = (32, 32)
    b_init: float = 6.0
    b_target: float = 4.0
    operator: Operator = Operator.BF16
    storage: Storage = Storage.NONE
    amplitude: float = 1.0
    through_max: bool = False

    def __post_init__(self) -> None:
        # Said so that NaN fails, too.
        if not 1 <= min(self.block) <= max(self.block) <= _LARGEST_SIDE:
            raise SpecError(f"blocks have 1 to {_LARGEST_SIDE} rows and columns, got {self.block}; 32 x 32 is usual.")
        if not (FEWEST_BITS <= self.b_init <= _MOST_BITS and FEWEST_BITS <= self.b_target <= _MOST_BITS):
            raise SpecError(
                f"b_init and b_target are between {FEWEST_BITS:g} and {_MOST_BITS:g}, got {self.b_init} and "
                f"{self.b_target}; 6 and 4 are the paper's."
            )
        if not 0 < self.amplitude < math.inf:
            raise SpecError(f"the amplitude of the noise is positive, got {self.amplitude}; 1 is the paper's.")

    @property
    def text(self) -> str:
        """All of it in a line, which an operator of torch can take."""
        parts = (getattr(self, field.name) for field in fields(self))
        return json.dumps([part.value if isinstance(part, Enum) else part for part in parts])

    @staticmethod
    @cache
    def of_text(text: str) -> Plan:
        """Return the plan whose `text` this is."""
        noise, fidelity, block, b_init, b_target, operator, storage, *rest = json.loads(text)
        kinds = PseudoNoise(noise), Fidelity(fidelity), (int(block[0]), int(block[1]))
        return Plan(*kinds, b_init, b_target, Operator(operator), Storage(storage), *rest)

    @property
    def span(self) -> float:
        """b_init - b_target."""
        return self.b_init - self.b_target

    @property
    def most_bits(self) -> float:
        """m + 2: the noise of more bits does not survive the cast."""
        fmt = self.storage.format
        return float((self.operator.mantissa_bits if fmt is None else fmt.mantissa_bits) + 2)

    def bits(self, b_i: Tensor) -> Tensor:
        """Return b of every block, not clamped."""
        return b_i * self.span + self.b_target

    def kept_bits(self, b_i: Tensor) -> Tensor:
        """Return b of every block within its bounds."""
        return self.bits(b_i).clamp(FEWEST_BITS, self.most_bits)


def exp2(x: Tensor) -> Tensor:
    """Return 2^x by products and sums alone, the same bits on every device; |x| below 100."""
    whole = torch.floor(x + 0.5)
    fraction, y = x - whole, torch.full_like(x, EXP2[0])
    for coefficient in EXP2[1:]:
        y = y * fraction + coefficient
    return y * power_of_two(whole.to(torch.int32), x.dtype)


def steps(amax: Tensor, b_i: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Return D, and the slope -ln 2 (b_init - b_target) D, 0 where b is beyond a bound.

    Args:
        amax: M, float32 or float64 [down, across].
        b_i: likewise.
        plan: bits and amplitude.
    """
    bits = plan.bits(b_i)
    clamped = bits.clamp(FEWEST_BITS, plan.most_bits)
    delta = amax * exp2(1 - clamped) * plan.amplitude
    return delta, torch.where(bits == clamped, delta * (-math.log(2) * plan.span), 0.0)


def forward(w: Tensor, b_i: Tensor, counter: Tensor, plan: Plan, origin: Block = (0, 0)) -> tuple[Tensor, Tensor]:
    """Return W^ in w's dtype, on the grid of operator and storage, and the slope of every block.

    Args:
        w: [rows, columns], any float dtype; computed in float32, or in float64 where it is that.
        b_i: [down, across].
        counter: int64 [3], see `draw`.
        plan: what is done.
        origin: of the first block in the whole weight, in blocks.
    """
    wide = torch.float64 if w.dtype == torch.float64 else torch.float32
    blocks = to_blocks(w.to(wide), plan.block)
    amax = blocks.abs().amax(-1)
    delta, slope = steps(amax, b_i.to(wide), plan)
    r = draw(plan.noise, plan.fidelity, counts(w.shape, plan.block), plan.block, counter, origin).to(wide)
    return from_blocks(cast(blocks + r * delta.unsqueeze(-1), amax, plan), w.shape, plan.block).to(w.dtype), slope


def cast(blocks: Tensor, amax: Tensor, plan: Plan) -> Tensor:
    """Round to storage and operator; the dtype stays."""
    if plan.storage.format is not None:
        blocks = block_cast(blocks, amax, plan.storage.format)
    return blocks if plan.operator is Operator.FP32 else blocks.to(plan.operator.dtype).to(blocks.dtype)


def gradient_through_max(
    g: Tensor, w: Tensor, b_i: Tensor, counter: Tensor, plan: Plan, origin: Block = (0, 0)
) -> Tensor:
    """Return what the path through M adds to dL/dW: sign(w) 2^(1 - b) sum_B(G R) at the block's largest weight.

    Args:
        g: G, [rows, columns].
        w: the weight of `forward`.
        b_i: likewise.
        counter: likewise.
        plan: likewise.
        origin: likewise.
    """
    blocks = to_blocks(w, plan.block)
    amax, place = blocks.abs().max(-1, keepdim=True)
    wide = torch.float64 if w.dtype == torch.float64 else torch.float32
    share, _ = steps(torch.ones_like(b_i, dtype=wide), b_i.to(wide), plan)
    sums = backward(g, share, counter, plan, origin)
    at_the_largest = torch.zeros_like(blocks, dtype=wide).scatter_(-1, place, sums.unsqueeze(-1))
    return from_blocks(at_the_largest * blocks.sign(), w.shape, plan.block)


def without_noise(w: Tensor, plan: Plan) -> Tensor:
    """Return the weight of an evaluation: R = 0."""
    wide = torch.float64 if w.dtype == torch.float64 else torch.float32
    if plan.storage.format is None:
        return cast(w.to(wide), w, plan).to(w.dtype)
    blocks = to_blocks(w.to(wide), plan.block)
    return from_blocks(cast(blocks, blocks.abs().amax(-1), plan), w.shape, plan.block).to(w.dtype)


def backward(g: Tensor, slope: Tensor, counter: Tensor, plan: Plan, origin: Block = (0, 0)) -> Tensor:
    """Return dL/db_i: slope sum_B(G R), R drawn again.

    Args:
        g: G, [rows, columns].
        slope: of `forward`.
        counter: the same as in `forward`.
        plan: likewise.
        origin: likewise.
    """
    r = draw(plan.noise, plan.fidelity, counts(g.shape, plan.block), plan.block, counter, origin)
    sums = (to_blocks(g, plan.block).to(torch.float64) * r).sum(-1)
    return (sums * slope).to(slope.dtype)
