# SPDX-License-Identifier: Apache-2.0
"""What LAMB, LARS and Adafactor know of a whole tensor: its root mean square, its rows and columns.

The published ratios are of 2-norms of two tensors of one size, so roots of mean squares say the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbits.optim._sharding import Spread, spread, sum_over_ranks


@dataclass(frozen=True)
class Whole:
    """A tensor of which this rank holds all, or the shard that it holds of a parameter.

    Args:
        shape: of all of it.
        over: the ranks that hold the other shards.
    """

    shape: torch.Size
    over: Spread = ()

    @staticmethod
    def of(parameter: Tensor) -> Whole:
        """Return what a parameter is a shard of."""
        return Whole(parameter.shape, spread(parameter))

    def rms(self, x: Tensor) -> Tensor:
        """Return the root mean square of what `x` is this rank's shard of, a float32 scalar.

        Squares are summed in float64: none over- or underflows, whatever the gradient's scale.
        """
        square = torch.linalg.vector_norm(x, dtype=torch.float64).square()
        return (sum_over_ranks(square, self.over) / self.shape.numel()).sqrt().float()

    def rank_one(self, v: Tensor) -> Tensor:
        """Return R_i C_j / mean(C) of the row means R and column means C; stacks of matrices lie in the last two axes.

        Shards are cut along the first axis: of a matrix between rows, of a stack between matrices.
        """
        rows_are_cut = len(self.shape) == 2 and self.over
        total = v.sum(-2, keepdim=True)
        column = (sum_over_ranks(total, self.over) if rows_are_cut else total) / self.shape[-2]
        return outer(v.mean(-1, keepdim=True), column)


def outer(row: Tensor, column: Tensor) -> Tensor:
    """Return row column / mean(column), 0 where the mean is, for means [..., m, 1] and [..., 1, n] of one matrix."""
    mean = column.mean(-1, keepdim=True)
    return torch.where(mean > 0, row / mean, mean) * column  # NaN stays


def trust_ratio(weight: Tensor, step: Tensor) -> Tensor:
    """Return weight / step, and 1 where either is 0: a tensor of zeros must be able to leave it."""
    return torch.where((weight > 0) & (step > 0), weight / step, 1.0)
