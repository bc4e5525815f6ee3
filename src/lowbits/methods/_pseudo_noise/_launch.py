# SPDX-License-Identifier: Apache-2.0
"""The kernels of `lowbits.kernels.gaussws`, where they can do what a plan asks.

Blocks whose sides are powers of two, with 32 to 16,384 elements, on CUDA. Everything else is left to the eager
definition, whose bits are the same.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lowbits.methods._pseudo_noise._blocks import Block, counts
from lowbits.methods._pseudo_noise._draw import PseudoNoise, half_normal
from lowbits.methods._pseudo_noise._formats import Operator, top_exponent
from lowbits.methods._pseudo_noise._numerics import FEWEST_BITS, Plan

# Elements of a program, and of one of its warps. A warp has whole blocks to itself wherever it can: largest numbers and
# random words then pass through no shared memory, and nothing is computed twice.
_TILE, _ELEMENTS_A_WARP = 2048, 2048
_DISTRIBUTIONS = {PseudoNoise.ROUNDED_NORMAL: 0, PseudoNoise.UNIFORM: 1, PseudoNoise.NORMAL: 2}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _kernels() -> ModuleType | None:
    """The kernels, None where triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    from lowbits.kernels import gaussws

    return gaussws


def launchable(w: Tensor, plan: Plan) -> bool:
    """Whether the kernels do what `plan` asks of `w`."""
    return w.dtype in _FLOATS and w.is_contiguous() and runs_on(w.device, plan)


def runs_on(device: torch.device, plan: Plan) -> bool:
    """Whether the kernels know a plan: on CUDA, or on a CPU where Triton interprets (only tests do)."""
    rows, columns = plan.block
    fits = not (rows & (rows - 1) or columns & (columns - 1)) and 32 <= rows * columns <= 1 << 14
    if not fits or plan.noise not in _DISTRIBUTIONS:
        return False
    if device.type == "cuda":
        return _kernels() is not None
    loaded = sys.modules.get("lowbits.kernels.gaussws")
    return loaded is not None and bool(loaded.INTERPRETED)


def add_noise(
    w: Tensor, b_i: Tensor, counter: Tensor, plan: Plan, origin: Block, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return W^ in `dtype` and the slopes; see `forward` of the definition."""
    out = torch.empty(w.shape, dtype=dtype, device=w.device)
    slopes = torch.empty(counts(w.shape, plan.block), dtype=torch.float32, device=w.device)
    kernels, fmt = _kernels(), plan.storage.format
    assert kernels is not None
    grid, sizes = _geometry(w, plan, origin)
    stored = {} if fmt is None else {"TOP": top_exponent(fmt), "MANTISSA": fmt.mantissa_bits, "LARGEST": fmt.max}
    kernels.add_noise[(grid,)](
        w, b_i.float().contiguous(), counter, _table(w, plan), out, slopes, *sizes, plan.b_target, plan.span,
        FEWEST_BITS, plan.most_bits, plan.amplitude, -math.log(2) * plan.span, **_constants(plan),
        TO_BF16=plan.operator is Operator.BF16, TO_FP16=plan.operator is Operator.FP16, STORED=fmt is not None,
        LEAST=fmt.min_normal_exponent if fmt else 0, **{"TOP": 0, "MANTISSA": 0, "LARGEST": 0.0, **stored},
    )  # fmt: skip
    return out, slopes


def gradients(
    g: Tensor, counter: Tensor, slopes: Tensor, plan: Plan, origin: Block, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return G in `dtype` (itself where it has it) and dL/db_i; see `backward` of the definition."""
    g = g.contiguous()
    copied = g if g.dtype == dtype else torch.empty(g.shape, dtype=dtype, device=g.device)
    grad_bits = torch.empty_like(slopes)
    kernels = _kernels()
    assert kernels is not None
    grid, sizes = _geometry(g, plan, origin)
    kernels.gradients[(grid,)](
        g, counter, _table(g, plan), slopes, copied, grad_bits, *sizes, **_constants(plan), COPY=copied is not g
    )
    return copied, grad_bits


def draw(counter: Tensor, plan: Plan, shape: Block) -> Tensor:
    """Return R of every element of a weight, float32 of its shape."""
    kernels = _kernels()
    assert kernels is not None
    out = torch.empty(shape, dtype=torch.float32, device=counter.device)
    grid, (rows, columns, _, across, *_) = _geometry(out, plan, (0, 0))
    kernels.draw[(grid,)](counter, _table(out, plan), out, rows, columns, across, **_constants(plan))
    return out


def _geometry(w: Tensor, plan: Plan, origin: Block) -> tuple[int, tuple[int, ...]]:
    """Number of programs; rows, columns, blocks down and across, and the first block's row and column."""
    down, across = counts(w.shape, plan.block)
    return down * -(-across // _side_by_side(plan)), (*w.shape, down, across, *origin)


def _side_by_side(plan: Plan) -> int:
    return max(1, _TILE // (plan.block[0] * plan.block[1]))


def _constants(plan: Plan) -> dict[str, Any]:
    one, two = plan.fidelity.one, plan.fidelity.two
    return {
        "NOISE": _DISTRIBUTIONS[plan.noise],
        "N1": one.numerator,
        "K1": one.digits,
        "N2": two.numerator,
        "K2": two.digits,
        "BR": plan.block[0],
        "BC": plan.block[1],
        "NB": _side_by_side(plan),
        "num_warps": max(1, _side_by_side(plan) * plan.block[0] * plan.block[1] // _ELEMENTS_A_WARP),
        "enable_fp_fusion": False,
    }


def _table(w: Tensor, plan: Plan) -> Tensor | None:
    return half_normal(w.device) if plan.noise is PseudoNoise.NORMAL else None
