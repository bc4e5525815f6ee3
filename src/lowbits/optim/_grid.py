# SPDX-License-Identifier: Apache-2.0
"""Write an update into a parameter that is stored as codes: the definition that the kernels are held to.

    W = D q;   W' = rule(W, ...) in float32;   d = (W' - W) (1 / D);   q <- clamp(q + SR(d), low, high)

The difference is rounded, not W' / D: where the rule changes nothing no code moves, whatever D is
(arXiv:2412.04787, eq. 4; the published code loses 4 to 10 % of its codes there when W is held in half precision).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbits.errors import SpecError
from lowbits.nn import QParameter, Scaling, moved, rounded
from lowbits.optim._sharding import first_element, is_sharded, local
from lowbits.quantizers import Noise, Rounding


def memory_of(p: Tensor) -> Tensor:
    """Return what a kernel reads and writes: codes where there are codes, the tensor itself elsewhere."""
    return p.codes if isinstance(p, QParameter) else p


def as_float32(p: Tensor) -> Tensor:
    """Return the values of a parameter, float32."""
    return p.dequantize() if isinstance(p, QParameter) else p.float()


def name_of(p: Tensor, place: str) -> str:
    """Return by what the random bits of a parameter are drawn: its own name where it has one.

    Args:
        p: this rank's part of it.
        place: in the optimizer.
    """
    return (p.stream if isinstance(p, QParameter) else "") or place


def write_codes_(parameter: Tensor, new: Tensor, noise: Noise, step: Tensor) -> None:
    """Round updated values onto the grid of a parameter.

    Args:
        parameter: with the codes from before the update; all of it, or sharded.
        new: float32, of this rank's shard.
        noise: of the write-back.
        step: number of this update, int64.
    Raises:
        SpecError: steps are to be recomputed from the maximum of a shard; or it is cut otherwise than between rows.
    """
    p, draw = local(parameter), None
    assert isinstance(p, QParameter)
    if p.grid.rounding is Rounding.STOCHASTIC:
        draw = noise.uniform(p.shape, step, offset=first_element(parameter), device=p.device)
    if p.grid.scaling is Scaling.FIXED:
        p.store_(moved(p.unpacked(), new - p.dequantize(), p.step, p.grid, draw))
        return
    if is_sharded(parameter):
        raise SpecError(f"{p}: Scaling.RECOMPUTED needs the whole tensor on one rank. Use Scaling.FIXED.")
    _recompute_(p, new, draw)


def _recompute_(p: QParameter, new: Tensor, draw: Tensor | None) -> None:
    codes = p.unpacked()
    dims = tuple(range(1 if p.per_channel else 0, p.ndim))
    top = codes.amax(dims, keepdim=p.per_channel).to(torch.float32)
    p.step.copy_(torch.where(top > 0, p.step * (top / p.grid.high), p.step))
    p.store_(rounded(new / p.step, p.grid, draw))
