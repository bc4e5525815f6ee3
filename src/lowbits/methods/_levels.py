# SPDX-License-Identifier: Apache-2.0
"""Round weights to a few equally spaced levels between the smallest and the largest of their bucket.

    sc(v) = (v - low) / (high - low)
    q     = round(sc(v) n) / n,                              n = levels - 1
    Q(v)  = low + q (high - low)                             (arXiv:1802.05668, sec. 2.1)

The published code takes a bucket narrower than 1e-10 for a constant and moves it to its smallest element; here every
bucket keeps its smallest and its largest, bit for bit.

Legend: B buckets, S elements a bucket.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from lowbits.errors import ShapeError, SpecError
from lowbits.export import Buckets, PointTensor, between, bucketed, even_points, flattened, gradient_bucketed
from lowbits.kernels import as_dtype
from lowbits.methods._levels_launch import launched
from lowbits.quantizers import Noise, PerBlock, Rounding

MAX_LEVELS = 1 << 16
PUBLISHED_BUCKETS = PerBlock(256)


class Backward(Enum):
    """What the gradient with respect to Q(w) becomes with respect to w."""

    STRAIGHT_THROUGH = "straight-through"
    """The same: the published setting."""
    TRUNCATED = "truncated"
    """The same within [-1, 1]; beyond it w is clamped before rounding, and its gradient is 0."""
    RANGE_AWARE = "range-aware"
    """The exact one with the codes held fixed: smallest and largest of a bucket move all its levels."""


@dataclass(frozen=True)
class Levels:
    """Say on which levels a weight lives.

    Args:
        count: levels in a bucket, 2 to 65,536.
        buckets: which elements share a range: `PerBlock(256)` cuts the flattened tensor as published; `PerGroup(k)`
            and `PerRow()` stay within a row, so that removing a row moves no other; `PerTensor()` is no bucket at all.
        rounding: to the nearest level, or to a neighbour at random without bias.
    Raises:
        SpecError: there are fewer than two levels, or too many; or another rounding.
    """

    count: int = 16
    buckets: Buckets = PUBLISHED_BUCKETS
    rounding: Rounding = Rounding.NEAREST

    def __post_init__(self) -> None:
        if not 2 <= self.count <= MAX_LEVELS:
            raise SpecError(f"Levels({self.count}): 2 to {MAX_LEVELS:,} levels are possible; 4 bits are Levels(16).")
        if self.rounding not in (Rounding.NEAREST, Rounding.STOCHASTIC):
            raise SpecError(f"{self.rounding}: levels are rounded to by Rounding.NEAREST or Rounding.STOCHASTIC.")

    @staticmethod
    def of_bits(bits: int, buckets: Buckets = PUBLISHED_BUCKETS, rounding: Rounding = Rounding.NEAREST) -> Levels:
        """Return 2^bits levels.

        Args:
            bits: 1 to 16.
            buckets: as in the class.
            rounding: as in the class.
        Raises:
            SpecError: more bits, or none.
        """
        if not 1 <= bits <= 16:
            raise SpecError(f"levels of {bits} bits: 1 to 16 are possible; 32 leaves the weights of a run as they are.")
        return Levels(1 << bits, buckets, rounding)


def round_to_levels(
    w: Tensor, levels: Levels, noise: Tensor | None = None, backward: Backward = Backward.STRAIGHT_THROUGH
) -> Tensor:
    """Return Q(w); differentiable as `backward` says.

    Arithmetic is float64 for float64, else float32. What is not finite makes its bucket NaN. On CUDA it is one kernel.

    Args:
        w: floating point, any shape, not empty.
        levels: where to.
        noise: for stochastic rounding, of w's shape, uniform in [0, 1); or int64 [3], the draw and the two words of the
            key of a `Noise`, for its `uniform` without the memory.
        backward: what its gradient is.
    Returns:
        Of w's shape and dtype.
    Raises:
        SpecError: noise is missing or not wanted, or w is not floating point.
        ShapeError: w is empty, or noise has another shape.

    >>> round_to_levels(torch.tensor([0.0, 0.3, 0.8, 1.0]), Levels(3))
    tensor([0.0000, 0.5000, 1.0000, 1.0000])
    """
    _check(w, levels, noise)
    return _Rounded.apply(w, levels, noise, backward)


def encode(w: Tensor, levels: Levels) -> PointTensor:
    """Return w on its nearest levels as codes, whatever the rounding in training; `dequantize` is Q(w) bit for bit.

    Args:
        w: floating point, any shape, not empty; finite.
        levels: where to.
    """
    _check(w, levels, None if levels.rounding is Rounding.NEAREST else w)
    view = bucketed(working(w.detach()), levels.buckets)
    low, high = ranges(view)
    codes = _positions(view, low, high, levels.count, None)
    small = torch.uint8 if levels.count <= 256 else torch.int32
    points = even_points(levels.count, view.dtype, w.device)
    flat = flattened(codes.to(small), w.shape, levels.buckets)
    return PointTensor(flat, points, low[:, 0], high[:, 0], levels.buckets, w.dtype)


def working(w: Tensor) -> Tensor:
    """Return w in the precision of the arithmetic."""
    return w if w.dtype in (torch.float32, torch.float64) else w.float()


def ranges(view: Tensor) -> tuple[Tensor, Tensor]:
    """Return smallest and largest of each bucket, [B, 1] each."""
    return view.amin(1, keepdim=True), view.amax(1, keepdim=True)


def scaled(view: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return sc(v) in [0, 1], [B, S]; 0 where a bucket is constant."""
    extent = high - low
    return torch.where(extent == 0, 0.0, (view - low) / torch.where(extent == 0, 1.0, extent))


def _positions(view: Tensor, low: Tensor, high: Tensor, count: int, noise: Tensor | None) -> Tensor:
    """The number of the level of each element, as floating point."""
    target = scaled(view, low, high) * (count - 1)
    if noise is None:
        return target.round()
    below = target.floor()
    return below + (noise < target - below)


class _Rounded(torch.autograd.Function):
    """Q(w), and one of three gradients."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, levels: Levels, noise: Tensor | None, backward: Backward) -> Tensor:  # type: ignore[override]
        ctx.levels, ctx.kind = levels, backward
        counter = noise if noise is not None and noise.dtype == torch.int64 else None
        if backward is Backward.STRAIGHT_THROUGH and (noise is None or counter is not None):
            q = launched(w, levels.count, levels.buckets, counter)
            if q is not None:
                return q
        if counter is not None:
            draw, *key = counter.unbind()
            noise = Noise((key[0], key[1])).uniform(w.shape, draw, device=w.device)
        view = bucketed(working(w), levels.buckets)
        if backward is Backward.TRUNCATED:
            view = view.clamp(-1, 1)
        low, high = ranges(view)
        filled = None if noise is None else gradient_bucketed(noise, levels.buckets)
        # By a tensor: CUDA divides by a number as it multiplies by its reciprocal, which no file would reproduce.
        q = _positions(view, low, high, levels.count, filled) / torch.full_like(low[:1], levels.count - 1)
        if backward is Backward.RANGE_AWARE:
            ctx.save_for_backward(q - scaled(view, low, high), view.argmax(1), view.argmin(1))
        elif backward is Backward.TRUNCATED:
            ctx.save_for_backward(w.abs() <= 1)
        return as_dtype(flattened(between(q, low, high), w.shape, levels.buckets), w.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        if ctx.kind is Backward.STRAIGHT_THROUGH:
            return g, None, None, None
        if ctx.kind is Backward.TRUNCATED:
            (inside,) = ctx.saved_tensors
            return g * inside, None, None, None
        # dL/dv_j = g_j + [j = argmax] S - [j = argmin] S,  S = sum_i g_i (q_i - sc(v_i))
        error, top, bottom = ctx.saved_tensors
        view = gradient_bucketed(g, ctx.levels.buckets).to(error.dtype, copy=True)
        moved = (view * error).sum(1, keepdim=True)
        view.scatter_add_(1, top[:, None], moved).scatter_add_(1, bottom[:, None], -moved)
        return flattened(view, g.shape, ctx.levels.buckets).to(g.dtype), None, None, None


def _check(w: Tensor, levels: Levels, noise: Tensor | None) -> None:
    if not w.is_floating_point():
        raise SpecError(f"levels are for floating point, got {w.dtype}.")
    if w.numel() == 0:
        raise ShapeError(f"levels need at least one element, got shape {tuple(w.shape)}.")
    if (levels.rounding is Rounding.STOCHASTIC) != (noise is not None):
        raise SpecError(f"{levels}: stochastic rounding takes noise, nearest takes none; noise is {noise is not None}.")
    if noise is not None and noise.shape != (w.shape if noise.dtype != torch.int64 else (3,)):
        raise ShapeError(
            f"noise has shape {tuple(noise.shape)}, w has {tuple(w.shape)}: a number for each element, or int64 [3], a "
            "draw and a key."
        )
