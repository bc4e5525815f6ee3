# SPDX-License-Identifier: Apache-2.0
"""Cut a plane through the loss around the trained weights.

    f(a, b) = L(theta + a d1 + b d2)

Li et al. 2018, arXiv:1712.09913, sec. 4: the directions are Gaussian and *filter-normalised*, each output row of a
matrix rescaled to the norm of the weights in that row, since a network whose weights are scaled up looks flatter at a
fixed step. One-dimensional parameters (norms, biases) do not move.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from lowbits.analysis._evaluating import evaluating
from lowbits.analysis._linears import output_axes
from lowbits.errors import SpecError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Batch = TypeVar("Batch")
Direction = Mapping[str, Tensor]


@dataclass(frozen=True)
class Surface:
    """Losses on a square grid.

    Args:
        coordinates: `P` positions on either axis, ascending.
        losses: `P x P`; `losses[i][j]` is the mean loss at `theta + coordinates[i] d1 + coordinates[j] d2`, nats.
    """

    coordinates: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]


def filter_normalised_direction(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Draw a Gaussian direction whose output rows have the norms of the weights' rows.

        d_row <- d_row ||theta_row|| / ||d_row||          (arXiv:1712.09913, sec. 4)

    Drawn on the CPU from `seed` alone, so two models of equal shapes are cut along the same direction.

    Args:
        model: the model; a row is what produces one output: dimension 0 of a weight, dimension 1 where the weight is
            stored `[in, out]` as in GPT-2.
        seed: of the draw.
    Returns:
        A tensor per trainable parameter name, same shape and dtype; zero for parameters of fewer than two dimensions.
    """
    generator = torch.Generator().manual_seed(seed)
    axes = output_axes(model)
    direction = {}
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        draw = torch.randn(weight.shape, generator=generator).to(weight)
        direction[name] = _normalise(draw, weight.detach(), axes.get(name, 0)) if weight.dim() > 1 else draw.zero_()
    return direction


def _normalise(draw: Tensor, weight: Tensor, axis: int) -> Tensor:
    others = [d for d in range(weight.dim()) if d != axis]
    return draw * (weight.norm(dim=others, keepdim=True) / draw.norm(dim=others, keepdim=True).clamp_min(1e-30))


def loss_surface(
    model: nn.Module,
    loss: Callable[[nn.Module, Batch], Tensor],
    batches: Sequence[Batch],
    directions: tuple[Direction, Direction],
    *,
    span: float = 1.0,
    points: int = 21,
) -> Surface:
    """Evaluate the mean loss of fixed batches on a grid spanned by two directions.

    Args:
        model: measured in `eval` mode and left as it was, bit for bit.
        loss: `(model, batch) -> scalar` mean loss.
        batches: the evaluation batches, the same at every point.
        directions: d1 and d2 by parameter name, see `filter_normalised_direction`.
        span: the grid covers [-span, span] on either axis.
        points: positions on an axis; odd, so that the weights themselves are one of them.
    Returns:
        The grid of losses in nats.
    Raises:
        SpecError: no batch, or `points` is even or below 3.
    """
    if not batches or points < 3 or points % 2 == 0:
        raise SpecError(
            f"loss_surface: needs a batch and an odd number of points >= 3, got {len(batches)} and {points}."
        )
    coordinates = tuple(span * (2 * i - (points - 1)) / (points - 1) for i in range(points))
    weights = {name: p for name, p in model.named_parameters() if name in directions[0]}
    origin = {name: p.detach().clone() for name, p in weights.items()}

    def at(a: float, b: float) -> float:
        for name, weight in weights.items():
            weight.copy_(origin[name] + a * directions[0][name] + b * directions[1][name])
        return sum(loss(model, batch).item() for batch in batches) / len(batches)

    with torch.no_grad(), evaluating(model):
        try:
            losses = tuple(tuple(at(a, b) for b in coordinates) for a in coordinates)
        finally:
            for name, weight in weights.items():
                weight.copy_(origin[name])
    return Surface(coordinates, losses)


def heat_map(surface: Surface, title: str) -> Figure:
    """Draw the surface with contour lines (plotly, extra `train`).

    Args:
        surface: what `loss_surface` returned.
        title: heading of the picture.
    Returns:
        A plotly figure; `write_html` makes a self-contained page of it.
    """
    import plotly.graph_objects as go

    axis = list(surface.coordinates)
    # losses[i][j] has d1 along i; plotly wants z[y][x], so d1 becomes the vertical axis
    contour = go.Contour(x=axis, y=axis, z=[list(row) for row in surface.losses], colorbar={"title": "loss (nats)"})
    return go.Figure(contour, layout={"title": title, "xaxis": {"title": "along d2"}, "yaxis": {"title": "along d1"}})
