# SPDX-License-Identifier: Apache-2.0
"""The kernel of `lowbits.kernels.levels`, where it can do what the eager definition in `_levels` does.

Buckets of at most 16,384 elements, on CUDA, with the published gradient. Everything else, compiled graphs included
(their compiler fuses the eager form itself), is left to the definition, whose bits are the same.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from lowbits.export import Buckets
from lowbits.quantizers import PerGroup, PerRow

_TILE, _LARGEST = 2048, 1 << 14  # elements of a program
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _kernels() -> ModuleType | None:
    """The kernels, None where triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    from lowbits.kernels import levels

    return levels


def usable(device: torch.device) -> bool:
    """Whether the kernel runs on a device: CUDA, or a CPU where Triton interprets it, which only tests ask for."""
    if device.type == "cuda":
        return _kernels() is not None
    loaded = sys.modules.get("lowbits.kernels.levels")
    return loaded is not None and bool(loaded.INTERPRETED)


def launched(w: Tensor, count: int, buckets: Buckets, counter: Tensor | None) -> Tensor | None:
    """Return Q(w), or None where the definition has to do it.

    Args:
        w: floating point, not empty.
        count: levels.
        buckets: which elements share a range.
        counter: int64 [3] on w's device: draw and key; None for the nearest level.
    """
    by_row = isinstance(buckets, PerRow | PerGroup) and w.ndim > 1
    rows = w.shape[0] if by_row else 1
    length = w.numel() // rows
    size = min(getattr(buckets, "size", length), length)
    if torch.compiler.is_compiling() or w.dtype not in _FLOATS or size > _LARGEST or not usable(w.device):
        return None
    kernels = _kernels()
    assert kernels is not None
    w = w.contiguous()
    out, across = torch.empty_like(w), -(-length // size)
    width = max(16, 1 << (size - 1).bit_length())  # a power of two
    together = max(1, _TILE // width)
    number = rows * across
    with torch.cuda.device_of(w):
        kernels.round_to_levels[(math.ceil(number / together),)](
            w, counter, out, length, size, across, number, float(count - 1), NOISE=counter is not None, S=width,
            NB=together, num_warps=4 if width <= 4096 else 8, enable_fp_fusion=False,
        )  # fmt: skip
    return out
