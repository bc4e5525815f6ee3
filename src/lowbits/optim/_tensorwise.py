# SPDX-License-Identifier: Apache-2.0
"""What LAMB, LARS and Adafactor know of a whole tensor: its root mean square.

Their published ratios are of 2-norms of two tensors of one size, so the root of the mean square says the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowbits.optim._sharding import spread, sum_over_ranks

Rms = Callable[[Tensor], Tensor]
"""Root mean square of a whole tensor, of which the argument is what this rank holds; float32 scalar."""


def rms(x: Tensor) -> Tensor:
    """Return the root mean square of a tensor that this rank holds all of; float32, any shape but an empty one."""
    return rms_like(x)(x)


def rms_like(parameter: Tensor) -> Rms:
    """Return `rms` for tensors that are sharded like a parameter; it adds up over the ranks.

    Squares are summed in float64: none over- or underflows, whatever the gradient's scale.
    """
    count, over = parameter.numel(), spread(parameter)  # all elements, also of a DTensor

    def of(x: Tensor) -> Tensor:
        square = torch.linalg.vector_norm(x, dtype=torch.float64).square()
        return (sum_over_ranks(square, over) / count).sqrt().float()

    return of


def trust_ratio(weight: Tensor, step: Tensor) -> Tensor:
    """Return weight / step, and 1 where either is 0: a tensor of zeros must be able to leave it."""
    return torch.where((weight > 0) & (step > 0), weight / step, 1.0)
