# SPDX-License-Identifier: Apache-2.0
"""From a float weight to codes: the rule that gives the step, once, before training."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from lowbits.errors import SpecError
from lowbits.nn._grid import Grid, rounded
from lowbits.nn._qparameter import QParameter

FLOOR = 1e-5
"""The smallest extent that the published code divides by."""

_MEAN_OF_NORMAL = 0.7978845608028654  # E|x| of N(0, 1)


class StepRule(Enum):
    """What of a weight the highest code stands for; D = that / high.

    - ABSMEAN_TOP: mean |W|, as published: 42 % of a Gaussian start saturated, and weights never exceed it;
    - ABSMAX: max |W|: nothing saturates;
    - SIGMA: k times the root mean square of W;
    - POWER_OF_TWO: as ABSMEAN_TOP, and D rounded to the nearest power of two, so that D q is exact in bfloat16.
    """

    ABSMEAN_TOP = "absmean top"
    ABSMAX = "absmax"
    SIGMA = "sigma"
    POWER_OF_TWO = "power of two"


@dataclass(frozen=True)
class StepInit:
    """Say how a weight gets its step.

    Args:
        rule: see `StepRule`.
        per_channel: one step for each index of the first axis; vectors have one all the same.
        sigmas: k of `StepRule.SIGMA`.
        sigma_of_zeros: a tensor of zeros has no extent; it gets the step of one drawn from N(0, sigma^2). The
            published rule would give it a range of 1e-5, in which it could never train.
    Raises:
        SpecError: k or sigma is not positive.
    """

    rule: StepRule = StepRule.ABSMEAN_TOP
    per_channel: bool = False
    sigmas: float = 4.0
    sigma_of_zeros: float = 0.02

    def __post_init__(self) -> None:
        if not (self.sigmas > 0 and self.sigma_of_zeros > 0):
            raise SpecError(f"StepInit: sigmas and sigma_of_zeros are positive, got {self}.")

    def step(self, weight: Tensor, grid: Grid) -> Tensor:
        """Return D, float32: a scalar, or [rows, 1, ...].

        Args:
            weight: float, any shape.
            grid: the codes that there are.
        """
        rows = self.per_channel and weight.ndim > 1
        dims, size = tuple(range(1 if rows else 0, weight.ndim)), weight.abs().float()
        amax = size.amax(dims, rows)
        match self.rule:
            case StepRule.ABSMAX:
                extent, of_normal = amax, 3.0
            case StepRule.SIGMA:
                extent, of_normal = self.sigmas * size.square().mean(dims, rows).sqrt(), self.sigmas
            case StepRule.ABSMEAN_TOP | StepRule.POWER_OF_TWO:
                extent, of_normal = size.mean(dims, rows), _MEAN_OF_NORMAL
        extent = torch.where(amax == 0, of_normal * self.sigma_of_zeros, extent.clamp_min(FLOOR))
        step = extent / grid.high
        return step.log2().round().exp2() if self.rule is StepRule.POWER_OF_TWO else step


def quantize_parameter(
    weight: Tensor, grid: Grid, init: StepInit | None = None, dtype: torch.dtype | None = None
) -> QParameter:
    """Return a parameter whose codes are the nearest ones to a float weight.

        D = extent / high;   q = clamp(round(W / D), low, high)                 (arXiv:2412.04787; `utils_quant.py`)

    Args:
        weight: float, at least one axis, finite.
        grid: the codes that there are.
        init: how the step comes about; None: the published rule, per tensor.
        dtype: of the gradient; None: the weight's.
    Raises:
        SpecError: the weight is not finite.

    >>> quantize_parameter(torch.tensor([[0.3, -0.1, 0.0]]), Grid.of(1.58)).unpacked().tolist()
    [[1, -1, 0]]
    """
    init = init or StepInit()
    weight = weight.detach()
    if not weight.is_meta and not bool(weight.isfinite().all()):
        raise SpecError(f"quantize_parameter: a weight {tuple(weight.shape)} is not finite. Initialise it anew.")
    step = init.step(weight, grid)
    codes = rounded(weight.float() / step, grid, None)
    return QParameter.of(codes, step, grid, dtype or weight.dtype)
