# SPDX-License-Identifier: Apache-2.0
"""One factor for every gradient: clipping, loss scale, and whether to step at all, without waiting for the device.

A factor that is not finite says: leave what it belongs to as it is, parameter, moments and step counter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbits.errors import SpecError
from lowbits.optim._sharding import local, spread, sum_over_ranks

HISTORY = "clip.history"
"""Where `Percentile` keeps a parameter's last gradient norms in its state; -1 where there was none yet."""


@dataclass(frozen=True)
class GlobalNorm:
    """Scale all gradients down to a common 2-norm, as `torch.nn.utils.clip_grad_norm_` does.

    Where the norm is not finite the whole step is skipped.

    Args:
        limit: the largest norm of all gradients together, above 0.
    Raises:
        SpecError: the limit is not positive.
    """

    limit: float

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise SpecError(f"GlobalNorm: limit is positive, got {self.limit}. Pass clip=None not to clip.")


@dataclass(frozen=True)
class Percentile:
    """Scale each gradient down to a percentile of the norms that it had of late, as bitsandbytes up to 0.49 did.

        n_t = ||g_t||_2;   limit = percentile of n_(t - history + 1) .. n_t;   g <- g min(1, limit / n_t)

    Before there is a history all of it is the first norm, so the first step is not clipped. A parameter whose norm is
    not finite skips the step, the others do not.

    Args:
        percentile: 1 to 99; 5 was the documented choice.
        history: how many norms are kept, float32, in the optimizer's state.
    Raises:
        SpecError: the percentile or the length is out of range.
    """

    percentile: int = 5
    history: int = 100

    def __post_init__(self) -> None:
        if not 1 <= self.percentile <= 99:
            raise SpecError(f"Percentile: percentile is 1 to 99, got {self.percentile}. Pass clip=None not to clip.")
        if self.history < 2:
            raise SpecError(f"Percentile: history is at least 2, got {self.history}; 100 is the published one.")


Clip = GlobalNorm | Percentile


def gradient_factors(
    clip: Clip | None,
    gradients: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor | None:
    """Return what the gradients are multiplied by before the update.

    Args:
        clip: how to clip.
        gradients: at least one, dense floats.
        states: of their parameters: `step`, the number of updates so far, and for `Percentile` the history, which
            takes up the new norms here.
        grad_scale: what the loss was multiplied by.
        found_inf: not 0 where nothing must be updated.
    Returns:
        float32: of no dimension, one factor for all; or [gradients], one for each; None stands for 1.
    """
    if clip is None and grad_scale is None and found_inf is None:
        return None
    device = gradients[0].device
    one = torch.ones((), dtype=torch.float64, device=device)
    unscale = one if grad_scale is None else one / grad_scale.to(device)
    if found_inf is not None:
        unscale = torch.where(found_inf.to(device) == 0, unscale, torch.nan)
    match clip:
        case None:
            factors = one
        case GlobalNorm(limit):
            norm = torch.linalg.vector_norm(gradient_norms(gradients)) * unscale
            factors = torch.where(norm.isfinite(), limit / norm.clamp_min(limit), torch.nan)
        case Percentile():
            factors = _percentile_factors(clip, gradient_norms(gradients) * unscale, states)
    return (factors * unscale).float()


def gradient_norms(gradients: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm of each gradient, float64, on the first one's device.

    Squares of sharded gradients are added up over the ranks, once for all that are sharded alike; nothing else of a
    step communicates.
    """
    parts = torch._foreach_norm([local(g) for g in gradients], 2, torch.float64)  # type: ignore[reportPrivateImportUsage]
    norms = torch.stack([norm.to(parts[0].device) for norm in parts])
    spreads = [spread(g) for g in gradients]
    for over in dict.fromkeys(spreads):
        if over:
            alike = torch.tensor([over == other for other in spreads], device=norms.device)
            norms = torch.where(alike, sum_over_ranks(norms.square(), over).sqrt(), norms)
    return norms


def new_history(clip: Percentile, device: torch.device) -> Tensor:
    """Return a history without any norm."""
    return torch.full((clip.history,), -1.0, dtype=torch.float32, device=device)


def _percentile_factors(clip: Percentile, norms: Tensor, states: Sequence[Mapping[str, Tensor]]) -> Tensor:
    device, norms = norms.device, norms.float().unsqueeze(1)
    stored = [state[HISTORY] for state in states]
    old = torch.stack([history.to(device) for history in stored])
    steps = torch.stack([state["step"].to(device) for state in states]).unsqueeze(1)
    position = torch.arange(clip.history, device=device) == (steps + 1) % clip.history
    new = torch.where(position | (old < 0), norms, old)
    limit = new.sort(1).values[:, clip.percentile * clip.history // 100].unsqueeze(1)
    kept = torch.where(norms.isfinite(), new, old)
    torch._foreach_copy_(stored, list(kept.unbind()))  # type: ignore[reportPrivateImportUsage]
    factors = torch.where(norms > limit, limit / norms, 1.0)
    return torch.where(norms.isfinite(), factors, torch.nan).squeeze(1).double()
