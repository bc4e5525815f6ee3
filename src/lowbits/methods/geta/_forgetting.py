# SPDX-License-Identifier: Apache-2.0
"""Forgetting rate and step size from two inner products, so that the joint update stays a descent direction."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

ETA, XI, BETA = 0.999, 0.9, 0.8
"""Share of the descent that forgetting may not use up; share of the rest for the steps; factor of slowing down."""
_TINY = 1e-12


class Products(NamedTuple):
    """Inner products on the doomed coordinates; D dimensions, E pairs of a dimension and a quantized layer in it.

    Args:
        descent: a = <grad f, alpha u>, `[D]`.
        clipped: <grad f, sgn(x) c(x)>, `[D]`; members without a quantizer count x itself.
        size: mean of |c|, `[D]`.
        residual: e = <grad f, sgn(x) R(x)>, `[E]`.
    """

    descent: Tensor
    clipped: Tensor
    size: Tensor
    residual: Tensor


class Pairs(NamedTuple):
    """Which layer is quantized in which dimension.

    Args:
        dimension: int64 `[E]`.
        layer: int64 `[E]`.
    """

    dimension: Tensor
    layer: Tensor


class Rates(NamedTuple):
    """What the rule returns.

    Args:
        forgetting: gamma, `[D]`.
        step: d of every layer that a pair names, `[L]`; NaN for others.
        slope: <grad f, s> of the update s, `[D]`; below 0 where it descends.
    """

    forgetting: Tensor
    step: Tensor
    slope: Tensor


def uniform_rate(index: int, length: int) -> float:
    """Return gamma of uniform forgetting: applied at every step of a period it leaves nothing after the last.

        gamma = 1 - (K_p - k - 1) / (K_p - k)

    Args:
        index: k, the step within the period.
        length: K_p.
    """
    return 1 - (length - index - 1) / (length - index)


def rates(found: Products, pairs: Pairs, finest: Tensor, coarsest: Tensor, uniform: float) -> Rates:
    """Choose forgetting rates and steps so that x <- x - alpha u - gamma x^Q goes down (arXiv:2502.16638, sec. 5).

        <grad f, s> = -a - gamma <grad f, sgn c> - gamma sum_l d_l e_l  <= -(1 - xi) eta a  < 0

    The steps of one dimension are slowed together, so that no layer depends on the order of layers.

    Args:
        found: inner products.
        pairs: dimension and layer of each `found.residual`.
        finest: d(b_u) of every layer, `[L]`.
        coarsest: d(b_l) of every layer, `[L]`.
        uniform: gamma of uniform forgetting, which is never exceeded.
    Returns:
        Rates, steps within [finest, coarsest], and the slope that results.
    """
    a, beta = found.descent, found.clipped
    adaptive = ((1 - ETA) * a / (-beta).clamp_min(_TINY)).clamp(0, uniform)
    gamma = torch.where(beta >= 0, torch.full_like(a, uniform), adaptive)
    gamma = torch.where((found.size > _TINY) & a.isfinite() & beta.isfinite(), gamma, torch.zeros_like(a))
    low, high = finest[pairs.layer], coarsest[pairs.layer]
    e, rate, descent = found.residual, gamma[pairs.dimension], a[pairs.dimension]
    against = (e < 0) & (rate > 0)
    number = torch.zeros_like(a).index_add_(0, pairs.dimension, against.to(a.dtype))[pairs.dimension]
    limit = XI * ETA * descent / (rate * -e * number).clamp_min(_TINY)
    # A base optimizer that climbs on these coordinates (momentum may) promises nothing: take the finest step.
    limit = torch.where(descent > 0, limit, low)
    slower = torch.ceil(torch.log(low / limit) / -math.log(BETA)).clamp_min(0)
    slower = torch.where(against & slower.isfinite(), slower, torch.zeros_like(slower))
    most = torch.zeros_like(a).scatter_reduce_(0, pairs.dimension, slower, "amax")
    gamma = gamma * BETA**most
    candidate = torch.where(against, limit * BETA ** -most[pairs.dimension], high).minimum(high)
    step = torch.full_like(finest, torch.inf).scatter_reduce_(0, pairs.layer, candidate, "amin")
    step = torch.where(step.isfinite(), step.clamp(finest, coarsest), torch.full_like(step, torch.nan))
    bend = torch.zeros_like(a).index_add_(0, pairs.dimension, step[pairs.layer] * e)
    return Rates(gamma, step, -a - gamma * (beta + bend))
