# SPDX-License-Identifier: Apache-2.0
"""Keep a stretch of memory in few bits, whatever its shape: what waits for the backward pass.

`quantize(x, spec).pack()` with `PerBlock` is the definition, but for infinities below zero: masks have them, and they
would make their groups NaN. They count for no scale and take the lowest code, which symmetric scales leave unused.
`lowbits.kernels.memory` gives the same bytes in one launch, for 8 bits and groups of a power of two elements.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowbits.formats import INT8
from lowbits.kernels._launch import launch
from lowbits.kernels._operators import remembered
from lowbits.kernels._rows import made_of
from lowbits.kernels._units import kernels, launches
from lowbits.quantizers import PackedTensor, PerBlock, PerRow, QuantSpec, quantize

_ELEMENTS, _WARPS = 4096, 4  # that a program works on
_READABLE = (torch.bfloat16, torch.float16, torch.float32)


def pack_memory(x: Tensor, spec: QuantSpec) -> PackedTensor:
    """Return the codes of a tensor's elements, which lie together in memory, and the scales of each `spec` block.

    Args:
        x: floating point [N], contiguous, not empty.
        spec: of signed integers with a lowest code, symmetric, with `PerBlock` and nearest rounding.
    """
    plan = _plan(spec)
    if plan is None or x.dtype not in _READABLE or not launches("memory", x.device):
        lowest = x == -math.inf
        q = quantize(x.masked_fill(lowest, 0.0), spec)
        return replace(q, values=q.values.masked_fill(lowest, spec.format.min)).pack()
    size, constants = plan
    codes = x.new_empty(x.numel(), dtype=torch.int8)
    scale = x.new_empty((-(-x.numel() // size), 1), dtype=torch.float32)
    _launch("quantize", (x, codes, scale, x.numel()), constants, size, spec)
    return PackedTensor(codes.view(torch.uint8), scale, spec, (x.numel(),))


def unpack_memory(packed: PackedTensor, dtype: torch.dtype) -> Tensor:
    """Return what `pack_memory` was given, as its codes have it.

    Args:
        packed: of `pack_memory`.
        dtype: of the result [N]; bfloat16, float16 or float32.
    """
    plan, codes = _plan(packed.spec), packed.codes
    if plan is None or not launches("memory", codes.device):
        q = packed.unpack()
        return q.dequantize().masked_fill_(q.values == q.spec.format.min, -math.inf).to(dtype)
    y = codes.new_empty(packed.shape, dtype=dtype)
    _launch("decode", (codes.view(torch.int8), packed.scale, y, y.numel()), {}, plan[0], packed.spec)
    return y


@remembered
def _plan(spec: QuantSpec) -> tuple[int, dict[str, Any]] | None:
    """Size of a group and the constants of `quantize`; None where the kernels do not know it."""
    size = spec.granularity.size if isinstance(spec.granularity, PerBlock) else 0
    if size & (size - 1) or not 16 <= size <= _ELEMENTS or spec.format != INT8:
        return None
    made = made_of(replace(spec, granularity=PerRow()), None)  # a group is the row of a matrix
    if made is None:
        return None
    return size, {name.removesuffix("_K"): value for name, value in made[0].constants.items()}


def _launch(name: str, arguments: tuple[Any, ...], constants: dict[str, Any], size: int, spec: QuantSpec) -> None:
    groups = _ELEMENTS // size
    grid = -(-arguments[-1] // _ELEMENTS), 1, 1
    launch(
        getattr(kernels("memory"), name), grid, arguments,
        lambda: {**constants, "SIZE": size, "GROUPS": groups, "num_warps": _WARPS, "enable_fp_fusion": False}, spec,
        arguments[0].device,
    )  # fmt: skip
