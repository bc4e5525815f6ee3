# SPDX-License-Identifier: Apache-2.0
"""Gaussian weight sampling: train under noise of the size of a rounding error, with bit-widths that are learned.

Ahn and Yoo 2025, arXiv:2505.11170. In training every weight of a linear layer is W + R D, cast to the operator's
format: R is drawn from a rounded normal, D is the step of a b-bit grid over the block's largest number, b is learned
block by block. Nothing is rounded, so gradients are exact; a model that was trained so survives storage in few bits.

In one's own loop:

    convert_(model, Recipe())
    add_noise_(model, Plan(b_init=6, b_target=4), seed=0)
    set_draw_(noisy(model), number)                   before every forward pass, a number that never repeats
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lowbits.analysis import causal_loss
from lowbits.errors import SpecError
from lowbits.methods._contract import Method, Position, Table
from lowbits.methods._pseudo_noise._circuit import Fidelity
from lowbits.methods._pseudo_noise._draw import PseudoNoise
from lowbits.methods._pseudo_noise._export import (
    Aggregate,
    Rung,
    bit_forms,
    ladder_,
    ladder_sizes,
    load_ladder,
    noisy_weights,
    save_ladder,
    write_ladder,
)
from lowbits.methods._pseudo_noise._formats import LADDER, SMALLEST_LADDER, Operator, Storage, rung
from lowbits.methods._pseudo_noise._model import Resample, add_noise_, bit_groups, bit_penalty, noisy, number_of
from lowbits.methods._pseudo_noise._numerics import Plan
from lowbits.methods._pseudo_noise._tables import bit_metrics, bit_tables, survival
from lowbits.methods._pseudo_noise._weight import NoisyWeight, set_draw_

__all__ = [
    "LADDER",
    "SMALLEST_LADDER",
    "Aggregate",
    "Fidelity",
    "GaussWS",
    "NoisyWeight",
    "Operator",
    "Plan",
    "PseudoNoise",
    "Regulariser",
    "Resample",
    "Rung",
    "Storage",
    "add_noise_",
    "bit_penalty",
    "example",
    "ladder_",
    "ladder_sizes",
    "load_ladder",
    "noisy",
    "rung",
    "save_ladder",
    "set_draw_",
    "survival",
]


class Regulariser(Enum):
    """What pulls the bits to b_target.

    `decay`: decoupled weight decay of b_i. `loss`: a term of the loss, |b_t - b_target| averaged over the blocks of
    each layer, summed over layers. `loss_by_size`: the same, blocks counted by elements and layers by their size.
    """

    DECAY = "decay"
    LOSS = "loss"
    LOSS_BY_SIZE = "loss_by_size"


@dataclass(frozen=True)
class GaussWS(Method):
    """Train under weight noise with learned bit-widths (Ahn and Yoo 2025, arXiv:2505.11170).

    Args:
        noise: distribution of the noise; uniform and normal are DiffQ's.
        fidelity: of the rounded normal: 12, 16 or 21 random words for 32 weights.
        block_rows: rows of a block, of the weight as it is stored; 1 to 128 in powers of two are fast.
        block_columns: columns of a block.
        b_init: bits at first.
        b_target: bits to which they are pulled.
        regulariser: what pulls.
        pull: weight decay of the bit-widths, or the factor of the term in the loss.
        bit_lr: peak learning rate of the bit-widths; none: that of the run. A short run needs a larger one.
        resample: when new noise is drawn.
        operator: format of the operand of the GEMM.
        storage: a format of few bits, one scale a block, to which the noisy weight is cast before.
        amplitude: factor of the noise; 0.506 gives it the variance of a rounding error of b bits.
        through_max: let the gradient pass through a block's largest number, too; the paper drops this path.
        lean: make the noisy weight again in the backward pass: no memory for it, one more pass over the weight.
    Raises:
        SpecError: a number is out of its range.
    """

    noise: PseudoNoise = PseudoNoise.ROUNDED_NORMAL
    fidelity: Fidelity = Fidelity.DEFAULT
    block_rows: int = 32
    block_columns: int = 32
    b_init: float = 6.0
    b_target: float = 4.0
    regulariser: Regulariser = Regulariser.DECAY
    pull: float = 0.1
    bit_lr: float | None = None
    resample: Resample = Resample.MICRO
    operator: Operator = Operator.BF16
    storage: Storage = Storage.NONE
    amplitude: float = 1.0
    through_max: bool = False
    lean: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.pull < math.inf and (self.bit_lr is None or 0 <= self.bit_lr < math.inf)):
            raise SpecError(f"pull and bit_lr are at least 0 and finite, got {self.pull} and {self.bit_lr}.")
        _ = self.plan

    @property
    def plan(self) -> Plan:
        """What is done to each weight."""
        return Plan(
            noise=self.noise,
            fidelity=self.fidelity,
            block=(self.block_rows, self.block_columns),
            b_init=self.b_init,
            b_target=self.b_target,
            operator=self.operator,
            storage=self.storage,
            amplitude=self.amplitude,
            through_max=self.through_max,
        )

    def prepare_(self, model: nn.Module, seed: int) -> None:
        """Give every converted layer its noise."""
        add_noise_(model, self.plan, seed, lean=self.lean)

    def param_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """Put the bit-widths into a group of their own."""
        decays = self.regulariser is Regulariser.DECAY
        return bit_groups(model, weight_decay, self.pull if decays else 0.0, self.bit_lr)

    def before_forward_(self, model: nn.Module, at: Position) -> None:
        """Number the draw."""
        set_draw_(noisy(model), number_of(at, self.resample))

    def loss(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Return the usual loss, and the term of the bits where they are pulled by it."""
        loss = causal_loss(model, ids)
        if self.regulariser is Regulariser.DECAY or self.noise is PseudoNoise.NONE:
            return loss
        return loss + self.pull * bit_penalty(model, by_size=self.regulariser is Regulariser.LOSS_BY_SIZE)

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Return mean, lowest and highest bits, and the share of blocks at a bound."""
        for parameter, weight in noisy_weights(model).values():
            weight.check_finite(parameter)
        return bit_metrics(model)

    def forms(self, model: nn.Module) -> dict[str, AbstractContextManager[object]]:
        """Return the model as its exported file would hold it."""
        return bit_forms(model)

    def write(self, model: nn.Module, folder: Path) -> None:
        """Leave the model with each block in the smallest format that its bits allow; `load_ladder` reads it."""
        write_ladder(model, folder)

    def tables(self, model: nn.Module) -> tuple[Table, ...]:
        """Return bits and noise by layer, the bit-width map, and the size on the ladder of formats."""
        return bit_tables(model)


def example() -> GaussWS:
    """Return what the tests of the contract train: blocks at the edge are partial, bits move in a few steps."""
    return GaussWS(block_rows=24, block_columns=16, bit_lr=0.1)
