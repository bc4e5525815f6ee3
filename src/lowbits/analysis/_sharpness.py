# SPDX-License-Identifier: Apache-2.0
"""Measure how sharp the minimum is: by how much the loss rises within a small ball around the weights.

    S_m(theta, rho) = mean over batches B of  max { L_B(theta + e) - L_B(theta) : ||e||_2 <= R },   R = rho ||theta||_2

Foret et al. 2021, arXiv:2010.01412, sec. 3 (m-sharpness). `rho` is relative, so that two models whose weights have
different norms are compared at the same relative perturbation. The inner maximum is approached by `steps` normalised
gradient steps, each projected back on the ball; one step is the classical estimate, five come close to the maximum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from lowbits.analysis._evaluating import evaluating
from lowbits.errors import SpecError

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Sharpness:
    """m-sharpness and its spread over batches.

    Args:
        value: mean rise of the loss over the batches, nats.
        standard_error: of that mean; nan for a single batch.
        per_batch: rise of the loss per batch, nats.
        loss: mean loss at the unperturbed weights, nats.
        rho: radius relative to the norm of the weights.
        radius: radius of the ball, `rho * ||theta||`.
        steps: ascent steps taken.
    """

    value: float
    standard_error: float
    per_batch: tuple[float, ...]
    loss: float
    rho: float
    radius: float
    steps: int


def m_sharpness(
    model: nn.Module,
    loss: Callable[[nn.Module, Batch], Tensor],
    batches: Sequence[Batch],
    *,
    rho: float = 0.01,
    steps: int = 1,
) -> Sharpness:
    """Return the mean, over batches, of the highest loss found within a ball around the weights.

    One step goes to `e = R g / ||g||`; `k > 1` steps are `2 R / k` long, so that the surface of the ball is reached
    half-way and the rest of the steps move along it; the highest loss on the path counts.

    Args:
        model: anything with trainable parameters; measured in `eval` mode and left as it was, bit for bit.
        loss: `(model, batch) -> scalar` mean loss.
        batches: disjoint batches of m examples each, at least one.
        rho: radius relative to the L2 norm of all trainable parameters, > 0.
        steps: ascent steps, >= 1.
    Returns:
        The mean rise in nats with its standard error.
    Raises:
        SpecError: no batch, or `rho` or `steps` not positive.
    """
    if not batches or rho <= 0 or steps < 1:
        raise SpecError(
            f"m_sharpness: needs a batch, rho > 0 and steps >= 1, got {len(batches)} batches, rho {rho}, steps {steps}."
        )
    weights = [p for p in model.parameters() if p.requires_grad]
    radius = rho * _norm(weights)
    with evaluating(model):
        paths = [_ascend(model, loss, batch, weights, radius, steps) for batch in batches]
    rises = torch.tensor([max(path[1:]) - path[0] for path in paths], dtype=torch.float64)
    return Sharpness(
        value=rises.mean().item(),
        standard_error=rises.std().item() / len(paths) ** 0.5 if len(paths) > 1 else float("nan"),
        per_batch=tuple(rises.tolist()),
        loss=sum(path[0] for path in paths) / len(paths),
        rho=rho,
        radius=radius,
        steps=steps,
    )


def _ascend(
    model: nn.Module,
    loss: Callable[[nn.Module, Batch], Tensor],
    batch: Batch,
    weights: list[nn.Parameter],
    radius: float,
    steps: int,
) -> list[float]:
    """Return the losses along the path, the unperturbed one first."""
    length = radius if steps == 1 else 2 * radius / steps
    offset = [torch.zeros_like(w) for w in weights]
    losses = []
    with _restored(weights) as origin:
        for _ in range(steps):
            value = loss(model, batch)
            losses.append(value.item())
            gradient = torch.autograd.grad(value, weights, allow_unused=True)
            _step_(offset, gradient, length, radius)
            with torch.no_grad():
                for w, start, e in zip(weights, origin, offset, strict=True):
                    w.copy_(start + e)
        with torch.no_grad():
            losses.append(loss(model, batch).item())
    return losses


def _step_(offset: list[Tensor], gradient: Sequence[Tensor | None], length: float, radius: float) -> None:
    """Move `offset` by `length` along the gradient and back into the ball."""
    norm = _norm([g for g in gradient if g is not None])
    if norm == 0.0:
        return
    for e, g in zip(offset, gradient, strict=True):
        if g is not None:
            e.add_(g, alpha=length / norm)
    overshoot = _norm(offset) / radius
    if overshoot > 1.0:
        for e in offset:
            e.div_(overshoot)


@contextmanager
def _restored(weights: list[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Yield copies of the weights and put them back at the end."""
    origin = [w.detach().clone() for w in weights]
    try:
        yield origin
    finally:
        with torch.no_grad():
            for w, start in zip(weights, origin, strict=True):
                w.copy_(start)


def _norm(tensors: Sequence[Tensor]) -> float:
    """Return the L2 norm of all entries, summed in float64."""
    return sum(t.detach().double().square().sum().item() for t in tensors) ** 0.5
