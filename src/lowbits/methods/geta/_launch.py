# SPDX-License-Identifier: Apache-2.0
"""The kernels of `lowbits.kernels.geta`, where they can run: plain contiguous tensors on CUDA.

A quantizer is some forty small operators forward and backward, which a GPU starts one by one; as kernels it is three.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn

_BLOCK = 2048
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _kernels() -> ModuleType | None:
    """The kernels, None where triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    from lowbits.kernels import geta

    return geta


def launchable(x: Tensor, *scalars: Tensor) -> bool:
    """Whether the kernels can take a tensor: on CUDA, or on a CPU where Triton interprets (only tests do).

    Tracing goes by the definition: torch.compile and torch.export cannot look into a kernel, and they pass tensors of
    other classes or say that they compile.
    """
    plain = type(x) in (Tensor, nn.Parameter) and x.dtype in _FLOATS and x.is_contiguous() and x.numel() > 0
    if not plain or torch.compiler.is_compiling() or any(s.dtype != torch.float32 for s in scalars):
        return False
    if x.is_cuda:
        return all(s.device == x.device for s in scalars) and _kernels() is not None
    loaded = sys.modules.get("lowbits.kernels.geta")
    return loaded is not None and bool(loaded.INTERPRETED)


def quantize(x: Tensor, step: Tensor, limit: Tensor, exponent: Tensor) -> Tensor:
    """Return x on the grid; see `lowbits.methods.geta.quantize`."""
    kernels = _kernels()
    assert kernels is not None
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        kernels.quantize[(_programs(x),)](x, step, limit, exponent, out, x.numel(), BLOCK=_BLOCK)
    return out


def gradients(
    x: Tensor, g: Tensor, scalars: tuple[Tensor, Tensor, Tensor], share: float, mapped: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, and those of step, limit and exponent times `share`, float32 `[3]`."""
    kernels = _kernels()
    assert kernels is not None
    grad_x = torch.empty_like(x)
    partial = torch.empty(_programs(x), 3, device=x.device)
    with torch.cuda.device_of(x):
        kernels.gradients[(_programs(x),)](
            x, g.contiguous(), *scalars, grad_x, partial, x.numel(), share, MAPPED=mapped, BLOCK=_BLOCK
        )
    return grad_x, partial.sum(0)


def _programs(x: Tensor) -> int:
    return -(-x.numel() // _BLOCK)
