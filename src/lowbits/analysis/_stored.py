# SPDX-License-Identifier: Apache-2.0
"""Say how many bytes a tensor takes in few bits, before there is one."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from lowbits.quantizers import QuantSpec, Rounding, quantize


@lru_cache(maxsize=1024)
def stored_bytes(shape: tuple[int, ...], spec: QuantSpec) -> int:
    """Return the bytes of a tensor stored as packed codes, float32 scales and zero points.

    Runs the quantizer on a tensor without data, so it is what `quantize(...).pack()` allocates, to the byte.

    Args:
        shape: of the tensor, its last axis contracted by the GEMM.
        spec: how it is quantized.
    Raises:
        ShapeError: the granularity does not fit the shape.
    """
    return quantize(torch.empty(shape, device="meta"), replace(spec, rounding=Rounding.NEAREST)).pack().nbytes()
