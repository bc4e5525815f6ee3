# SPDX-License-Identifier: Apache-2.0
"""From a float weight to codes: the rule that gives the step, once, before training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from lowbits.errors import SpecError
from lowbits.nn._grid import Grid, rounded
from lowbits.nn._qparameter import QParameter
from lowbits.quantizers import Noise

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


_CHUNK = 1 << 24  # elements drawn at a time


def normal_values(shape: Sequence[int], sigma: float, noise: Noise, device: torch.device, first: int = 0) -> Tensor:
    """Draw from N(0, sigma^2), by the inverse of its distribution function at `Noise.uniform`.

    Args:
        shape: of the result.
        sigma: standard deviation.
        noise: the stream.
        device: of the result.
        first: index of the first element in the whole tensor, where this is a chunk of it.
    Returns:
        float32; at most 5.4 sigma, since the draws have 24 bits.
    """
    u = noise.uniform(shape, 0, offset=first, device=device)
    # The middle of a draw's step, from the nearer end: exact in float32, and never 0 or 1, where it would be infinite.
    near = torch.where(u < 0.5, u + 2.0**-25, (1 - u) - 2.0**-25)
    x = torch.special.ndtri(near)
    return torch.where(u < 0.5, x, -x) * sigma


def normal_parameter(
    shape: Sequence[int],
    grid: Grid,
    sigma: float,
    noise: Noise,
    *,
    init: StepInit | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> QParameter:
    """Draw a weight from N(0, sigma^2) straight into codes: no float tensor of its size ever exists.

    The step is that of the rule for the distribution, not for the sample: E|W| = 0.798 sigma in place of the mean.

    Args:
        shape: of the weight, at least one axis.
        grid: of the codes.
        sigma: standard deviation.
        noise: the stream of this weight.
        init: how the step comes about; None: the published rule. Three sigma stand for the largest magnitude.
        dtype: of the gradient.
        device: where it is made and stays.
    Raises:
        SpecError: sigma is not positive.
    """
    if not sigma > 0:
        raise SpecError(f"normal_parameter: sigma is positive, got {sigma}.")
    init, device = init or StepInit(), torch.device(device)
    rule = replace(init, sigma_of_zeros=sigma)
    step = rule.step(torch.zeros(*[1] * len(shape), device=device), grid)
    if init.per_channel and len(shape) > 1:
        step = step.expand(shape[0], *[1] * (len(shape) - 1))
    row = math.prod(shape[1:])
    stored = torch.empty(*shape[:-1], grid.row_bytes(shape[-1]), dtype=grid.dtype, device=device)
    made = QParameter(stored, step.contiguous(), grid, shape[-1], dtype, True)
    rows = max(1, _CHUNK // max(1, row)) if len(shape) > 1 else shape[0]
    for start in range(0, shape[0], rows):
        part = (min(rows, shape[0] - start), *shape[1:])
        values = normal_values(part, sigma, noise, device, start * row)
        of_rows = step[start : start + rows] if made.per_channel else step
        (stored[start : start + rows] if len(shape) > 1 else stored).copy_(
            grid.pack(rounded(values / of_rows, grid, None))
        )
    return made
