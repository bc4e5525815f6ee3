# SPDX-License-Identifier: Apache-2.0
"""A tensor of few levels: a code for each element, a table of points, and the range of each bucket.

    x_hat = low + p[code] (high - low)            where p < 1/2
    x_hat = high - (1 - p[code]) (high - low)     elsewhere

The two forms are one in real arithmetic; in floating point the first is exact at the bottom of a bucket and the second
at its top, so that smallest and largest element keep every bit and rounding twice is rounding once.
(Polino et al. 2018, arXiv:1802.05668, sec. 2, has alpha sc^-1 + beta with alpha = high - low, beta = low.)

Legend: B buckets, S elements a bucket, N elements, L levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowbits.errors import ShapeError, SpecError
from lowbits.quantizers import PerBlock, PerGroup, PerRow, PerTensor

Buckets = PerTensor | PerRow | PerBlock | PerGroup


@dataclass(frozen=True)
class PointTensor:
    """A tensor whose buckets share a table of points.

    Args:
        codes: integers below L, of the tensor's shape, or its transpose's.
        points: float, [L]; where between `low` and `high` each level lies.
        low: float, [B]; the smallest element of each bucket.
        high: float, [B]; the largest.
        buckets: which elements share a range. A row is all that one index of the first axis selects.
        dtype: of the tensor that was coded.
        learned: whether the points are a table of their own; equal steps need none.
        transposed: whether the codes are of the tensor's transpose, so that its columns share ranges.
    """

    codes: Tensor
    points: Tensor
    low: Tensor
    high: Tensor
    buckets: Buckets
    dtype: torch.dtype = torch.float32
    learned: bool = False
    transposed: bool = False

    def dequantize(self) -> Tensor:
        """Return the tensor, in its dtype."""
        positions = bucketed(self.points[self.codes.long()], self.buckets)
        values = between(positions, self.low[:, None], self.high[:, None])
        x_hat = flattened(values, self.codes.shape, self.buckets).to(self.dtype)
        return x_hat.t() if self.transposed else x_hat

    def t(self) -> PointTensor:
        """Return the transpose of a matrix, with the same codes."""
        return replace(self, transposed=not self.transposed)


def between(p: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the value at the fraction `p` of the way from `low` to `high`, exact at both ends.

    Args:
        p: float, any shape.
        low: float, broadcasts with p.
        high: likewise.
    """
    return torch.where(p < 0.5, low + p * (high - low), high - (1 - p) * (high - low))


def bucketed(x: Tensor, buckets: Buckets) -> Tensor:
    """Return a tensor cut into buckets.

    A bucket that is not full, the last of a tensor or of a row, is filled up with its last element, which changes
    neither its smallest nor its largest. A tensor or row shorter than a bucket is one short bucket.

    Args:
        x: any shape, not empty.
        buckets: which elements share a range.
    Returns:
        [B, S]; `flattened` undoes it.
    Raises:
        ShapeError: x is empty.
        SpecError: another granularity.
    """
    if x.numel() == 0:
        raise ShapeError(f"buckets need at least one element, got shape {tuple(x.shape)}.")
    rows = _rows(x.shape, buckets)
    match buckets:
        case PerTensor() | PerRow():
            return x.reshape(rows, -1)
        case PerBlock(size=size) | PerGroup(size=size):
            flat = x.reshape(rows, -1)
            size = min(size, flat.shape[1])
            missing = -flat.shape[1] % size
            # Not `replicate`: torch pads integers by constants only.
            filled = torch.cat([flat, flat[:, -1:].expand(-1, missing)], 1) if missing else flat
            return filled.reshape(-1, size)
        case _:
            raise SpecError(f"{buckets}: ranges are per tensor, row, block or group. Use PerBlock(256).")


def flattened(view: Tensor, shape: Sequence[int], buckets: Buckets) -> Tensor:
    """Return what `bucketed` was called on, without the filling.

    Args:
        view: [B, S].
        shape: of the result.
        buckets: as then.
    """
    rows = _rows(shape, buckets)
    return view.reshape(rows, -1)[:, : math.prod(shape) // rows].reshape(*shape)


def num_buckets(shape: Sequence[int], buckets: Buckets) -> int:
    """Return B of a tensor.

    Args:
        shape: of the tensor.
        buckets: which elements share a range.
    """
    rows = _rows(shape, buckets)
    size = getattr(buckets, "size", math.prod(shape))
    return rows * -(-(math.prod(shape) // rows) // size)


def gradient_bucketed(gradient: Tensor, buckets: Buckets) -> Tensor:
    """Return a gradient cut as its tensor is, with zeros where `bucketed` repeats an element.

    Args:
        gradient: any shape.
        buckets: as of the tensor.
    Returns:
        [B, S].
    """
    rows = _rows(gradient.shape, buckets)
    flat = gradient.reshape(rows, -1)
    size = min(getattr(buckets, "size", flat.shape[1]), flat.shape[1])
    return pad(flat, (0, -flat.shape[1] % size)).reshape(-1, size)


def _rows(shape: Sequence[int], buckets: Buckets) -> int:
    """Into how many independent pieces the tensor falls before it is cut."""
    by_row = isinstance(buckets, PerRow | PerGroup) and len(shape) > 1
    return shape[0] if by_row else 1
