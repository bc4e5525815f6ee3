# SPDX-License-Identifier: Apache-2.0
"""Differentiable quantization: train where the levels lie. Polino et al. 2018, arXiv:1802.05668, sec. 4.

    forward   Q(v) = low + p[i(v)] (high - low),   i(v) = the point nearest to sc(v)
    backward  dL/dp_j = sum over v with i(v) = j of dL/dQ(v) (high - low)
    step      p <- SGD(p);   the weights stay as they are

One table of points a tensor, shared by its buckets. Points are stored in the order in which they began and sorted when
they are used, so that every point keeps its own momentum, in any optimizer, when two change places.

Legend: B buckets, S elements a bucket, L points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbits.data import TokenData
from lowbits.errors import ConversionError, SpecError
from lowbits.export import (
    Buckets,
    PointTensor,
    between,
    bucketed,
    even_points,
    flattened,
    gradient_bucketed,
    save_coded,
)
from lowbits.kernels import as_dtype
from lowbits.methods._contract import Method, Table
from lowbits.methods._distillation_loss import Mixing
from lowbits.methods._distilled_runs import (
    FILE,
    NONE,
    SELF,
    Cut,
    Ends,
    attach_source_,
    levels_of,
    mixed_loss,
    size_table,
    teacher_loss,
    weight_metrics,
)
from lowbits.methods._levels import PUBLISHED_BUCKETS, Levels, ranges, scaled, working
from lowbits.methods._point_counts import gradient_norms, redistribute
from lowbits.methods._quantized_weights import Choose
from lowbits.methods._weight_views import Place, View, coded_model, install_, is_conv1d, viewed
from lowbits.optim import param_groups
from lowbits.quantizers import Rounding

__all__ = [
    "Bits",
    "DifferentiableQuantization",
    "PointView",
    "Start",
    "Trained",
    "example",
    "gradient_norms",
    "learn_points_",
    "nearest_points",
    "point_parameters",
    "quantile_points",
    "redistribute",
    "resulting_bits",
]

_ADDRESSES = 4096
_PROBE = 128  # tokens of a sequence whose gradient shares out points


class Start(Enum):
    """Where points begin."""

    QUANTILE = "quantile"
    """At the quantiles j / (L - 1) of the scaled weights, so at 0 and 1 too."""
    EVEN = "even"
    """In equal steps: at first the very function of quantized distillation."""


class Trained(Enum):
    """What a run trains.

    - POINTS: points alone, as published;
    - ALL: the weights too, straight through their points: quantized distillation on a learned grid.
    """

    POINTS = "points"
    ALL = "all"


def nearest_points(positions: Tensor, points: Tensor) -> Tensor:
    """Return the index of the nearest point for each position.

    A tie goes to the lower point, and among equal points to the first. Distances are compared as they round.

    Args:
        positions: floating point, any shape.
        points: floating point, [L], ascending.
    Returns:
        int64, of the shape of positions.
    """
    above = torch.searchsorted(points, positions).clamp_max(points.numel() - 1)
    below = (above - 1).clamp_min(0)
    lower = (positions - points[below]).abs() <= (points[above] - positions).abs()
    first = torch.searchsorted(points, points)
    return first[torch.where(lower, below, above)]


def quantile_points(w: Tensor, count: int, buckets: Buckets = PUBLISHED_BUCKETS) -> Tensor:
    """Return the quantiles j / (count - 1) of the scaled weights, ascending, [count].

    Args:
        w: floating point, any shape.
        count: of points, at least 2.
        buckets: which elements share a range.
    """
    view = bucketed(working(w.detach()), buckets)
    flat = flattened(scaled(view, *ranges(view)), w.shape, buckets).reshape(-1)
    ordered = flat.sort().values  # not torch.quantile: it refuses more than 2^24 elements
    where = torch.linspace(0, 1, count, dtype=torch.float64, device=w.device) * (flat.numel() - 1)
    below = where.floor().long().clamp_max(max(flat.numel() - 2, 0))
    above = (below + 1).clamp_max(flat.numel() - 1)
    return torch.lerp(ordered[below], ordered[above], (where - below).to(ordered.dtype))


class PointView(View):
    """A weight seen through learned points.

    Args:
        points: where they begin, [L], in any order.
        buckets: which elements share a range.
        transposed: whether the weight is [in, out], so that its rows are columns.
    """

    def __init__(self, points: Tensor, buckets: Buckets, transposed: bool = False) -> None:
        super().__init__()
        self.points = nn.Parameter(points)
        self.buckets, self.transposed = buckets, transposed

    def forward(self, weight: Tensor) -> Tensor:
        """Return Q(v); differentiable in the points, and in the weight straight through if it is trained.

        Args:
            weight: the parameter.
        """
        w = weight.t() if self.transposed else weight
        q = _LookedUp.apply(w, self.points.sort(stable=True).values, self.buckets)
        return q.t() if self.transposed else q

    def coded(self, weight: Tensor) -> PointTensor:
        """Return the weight as codes of its points."""
        w = weight.detach().t() if self.transposed else weight.detach()
        points = self.points.detach().sort(stable=True).values
        view = bucketed(working(w), self.buckets)
        low, high = ranges(view)
        codes = nearest_points(scaled(view, low, high), points)
        small = codes.to(torch.uint8 if points.numel() <= 256 else torch.int32)
        flat = flattened(small, w.shape, self.buckets)
        found = PointTensor(flat, points, low[:, 0], high[:, 0], self.buckets, w.dtype, learned=True)
        return found.t() if self.transposed else found

    def extra_repr(self) -> str:
        """Show how many points there are."""
        return f"{self.points.numel()} points, {self.buckets}"


class _LookedUp(torch.autograd.Function):
    """Q(v) from sorted points, and the gradients of both."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, points: Tensor, buckets: Buckets) -> Tensor:  # type: ignore[override]
        view = bucketed(working(w), buckets)
        low, high = ranges(view)
        codes = nearest_points(scaled(view, low, high), points)
        kept = codes.to(torch.uint8) if points.numel() <= 256 else codes
        ctx.save_for_backward(kept, high - low, points)
        ctx.buckets = buckets
        return as_dtype(flattened(between(points[codes], low, high), w.shape, buckets), w.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        codes, extent, points = ctx.saved_tensors
        found = None
        if ctx.needs_input_grad[1]:
            each = gradient_bucketed(g, ctx.buckets).double() * extent  # a point gathers thousands of terms
            found = _summed(codes.reshape(-1).long(), each.reshape(-1), points.numel()).to(points.dtype)
        return (g if ctx.needs_input_grad[0] else None), found, None


def _summed(codes: Tensor, terms: Tensor, count: int) -> Tensor:
    """Add up the terms of each code; neighbours into sums of their own: on a GPU all would wait for a few addresses."""
    lanes = max(1, _ADDRESSES // count)
    where = codes * lanes + torch.arange(codes.numel(), device=codes.device) % lanes
    total = torch.zeros(count * lanes, dtype=terms.dtype, device=terms.device)
    return total.index_add_(0, where, terms).view(count, lanes).sum(1)


def learn_points_(
    model: nn.Module,
    levels: Levels | Choose,
    *,
    start: Start = Start.QUANTILE,
    counts: Mapping[str, int] | None = None,
) -> list[str]:
    """Let the layers of a trained model run on learned points, in place; the weights themselves are frozen.

    A model of `quantize_weights_` may be passed: its master weights stay, and `Start.EVEN` begins where it is.

    Args:
        model: trained; norms and biases stay as they are.
        levels: how many points and which buckets, for all weights or a callable, as in `quantize_weights_`.
        start: where points begin.
        counts: another number of points by name, for example from `redistribute`.
    Returns:
        The names of the weights.
    Raises:
        ConversionError: no weight was chosen, or `counts` names another.
        SpecError: stochastic rounding, which points do not have.
    """
    names = install_(model, partial(_view, levels=levels, start=start, counts=counts or {}))
    if strange := set(counts or {}) - set(names):
        raise ConversionError(
            f"counts: {sorted(strange)[0]} is no weight with points; there are {', '.join(names[:8])}."
        )
    for place, _ in viewed(model):
        place.parameter.requires_grad_(False)
    return names


def _view(place: Place, *, levels: Levels | Choose, start: Start, counts: Mapping[str, int]) -> PointView | None:
    own = levels if isinstance(levels, Levels) else levels(place.name, place.module, place.parameter)
    if own is None:
        return None
    if own.rounding is Rounding.STOCHASTIC:
        raise SpecError(f"{place.name}: learned points take the nearest one; use Rounding.NEAREST.")
    count = counts.get(place.name, own.count)
    transposed = is_conv1d(place.module)
    w = place.parameter.detach()
    w = working(w.t() if transposed else w)
    even = even_points(count, w.dtype, w.device)
    return PointView(even if start is Start.EVEN else quantile_points(w, count, own.buckets), own.buckets, transposed)


def point_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained points by the name of their weight.

    Args:
        model: after `learn_points_`.
    """
    return {place.name: view.points for place, view in viewed(model) if isinstance(view, PointView)}


@dataclass(frozen=True)
class Bits:
    """What a distribution of points costs, in packed bits.

    Args:
        nominal: log2 of the mean number of points.
        packed: mean of ceil(log2 L) over all weights.
        fractional: mean of log2 L over all weights.
    """

    nominal: float
    packed: float
    fractional: float


def resulting_bits(model: nn.Module) -> Bits:
    """Return the bits a weight that the points really take, weighted by the tensors' sizes.

    Args:
        model: after `learn_points_`.
    """
    found = [
        (place.parameter.numel(), view.points.numel()) for place, view in viewed(model) if isinstance(view, PointView)
    ]
    weights = sum(n for n, _ in found)
    return Bits(
        math.log2(sum(points for _, points in found) / len(found)),
        sum(n * max(1, (points - 1).bit_length()) for n, points in found) / weights,
        sum(n * math.log2(points) for n, points in found) / weights,
    )


@dataclass(frozen=True)
class DifferentiableQuantization(Method):
    """Train where the levels of a trained model lie, and nothing else.

    Start from a trained model: --model FOLDER, for example a run of `--method distillation`.

    Args:
        teacher: as in `QuantizedDistillation`; published is `self`, the model before it was quantized.
        bits: of a point's number; 2^bits points for each weight.
        cut: what shares a range.
        size: of a bucket or group.
        start: where points begin.
        share_out: folder of tokens (`lowbits data prepare`); weights with larger gradients on five of its batches get
            more points. Empty: all get the same number.
        point_lr: peak learning rate of the points, in units of a bucket's range.
        trained: points alone, or all parameters.
        ends: whether embeddings and output head are quantized too.
        weight: of the teacher against the labels.
        temperature: of the teacher's and the student's softmax.
        cache: as in `QuantizedDistillation`.
        classes: how many a new cache keeps for each token.
    """

    teacher: str = SELF
    bits: int = 4
    cut: Cut = Cut.BUCKET
    size: int = 256
    start: Start = Start.QUANTILE
    share_out: str = ""
    point_lr: float = 1e-3
    trained: Trained = Trained.POINTS
    ends: Ends = Ends.QUANTIZED
    weight: float = 0.7
    temperature: float = 1.0
    cache: str = ""
    classes: int = 64

    def prepare_(self, model: nn.Module, seed: int) -> None:
        """Attach the teacher, put points before the weights, and freeze what is not trained."""
        chosen = levels_of(model, Levels.of_bits(self.bits, self.cut.buckets(self.size)), self.ends)
        attach_source_(model, self.teacher, self.cache, self.classes, Mixing(self.weight, self.temperature).temperature)
        learn_points_(model, chosen, start=self.start)
        if self.share_out:
            learn_points_(model, chosen, start=self.start, counts=self._counts(model, seed))
        model.requires_grad_(self.trained is Trained.ALL)
        for points in point_parameters(model).values():
            points.requires_grad_()

    def _counts(self, model: nn.Module, seed: int) -> dict[str, int]:
        """As many points as the gradients say; of three digits, so that no rounding on the way moves a point."""
        data, mixing = TokenData.open(self.share_out), Mixing(self.weight, self.temperature)
        longest = getattr(getattr(model, "config", None), "max_position_embeddings", _PROBE)
        batches = (data.batch("train", i, batch_size=2, block=min(longest, _PROBE), seed=seed) for i in range(5))
        norms = gradient_norms(model, lambda m, ids: teacher_loss(m, ids, mixing), batches)
        return redistribute(dict.fromkeys(norms, 1 << self.bits), {n: float(f"{x:.3g}") for n, x in norms.items()})

    def param_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """Return the points, with their own learning rate and no decay, and the other groups if all is trained."""

        def own(name: str, module: nn.Module, parameter: nn.Parameter) -> dict[str, float] | None:
            return {"lr": self.point_lr} if isinstance(module, PointView) else None

        return param_groups(model, weight_decay, own)

    def loss(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Return the mixed loss."""
        return mixed_loss(model, ids, Mixing(self.weight, self.temperature))

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Return the error of the weights and the entropy of their codes."""
        return weight_metrics(model)

    def write(self, model: nn.Module, folder: Path) -> None:
        """Leave the model as Huffman-coded levels: coded.safetensors, for `lowbits.export.load_coded`."""
        save_coded(folder / FILE, coded_model(model))

    def tables(self, model: nn.Module) -> tuple[Table, ...]:
        """Return where the bytes of the model would be."""
        return (size_table(model),)


def example() -> DifferentiableQuantization:
    """Return one that a model of two layers with fresh weights can be trained with."""
    return DifferentiableQuantization(teacher=NONE, bits=3, size=32, trained=Trained.ALL)
