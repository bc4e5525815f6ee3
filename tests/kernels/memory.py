# SPDX-License-Identifier: Apache-2.0
"""Hold the kernels of memory to the definition, bit for bit; a program, as `tests.kernels.rows` is.

TRITON_INTERPRET=1 python -m tests.kernels.memory
python -m tests.kernels.memory            # on CUDA
"""

from __future__ import annotations

import itertools
import math
import sys
from unittest.mock import patch

import torch
from torch import Tensor

import lowbits.kernels.memory  # noqa: F401  the interpreter's kernels are used where they are loaded
from lowbits.formats import INT8
from lowbits.kernels import _memory, pack_memory, unpack_memory
from lowbits.quantizers import Amax, PerBlock, PowerOfTwo, QuantSpec, ReciprocalAmax

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RULES = (Amax(), Amax(1e-5), PowerOfTwo(), ReciprocalAmax())
SIZES = (1, 127, 5000, 8192)


def stretch(count: int, dtype: torch.dtype) -> Tensor:
    """Many magnitudes, a group of zeros, infinities below zero all over, and groups that are spoilt."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, generator=generator) * 10 ** torch.randn(count, generator=generator)
    if count >= 5000:
        x[128:256], x[300], x[700] = 0, torch.nan, torch.inf
        x[1024:1152], x[2000::7] = -torch.inf, -torch.inf
    return x.to(DEVICE, dtype)


def differs(x: Tensor, spec: QuantSpec) -> str | None:
    packed = pack_memory(x, spec)
    back = unpack_memory(packed, x.dtype)
    with patch.object(_memory, "launches", lambda *_: False):
        expected = pack_memory(x, spec)
        wanted = unpack_memory(expected, x.dtype)
    size = spec.granularity.size  # type: ignore[union-attr]
    known = ~expected.scale.isnan().repeat_interleave(size)[: x.numel()]
    if not torch.equal(packed.codes[known], expected.codes[known]):
        return "codes differ"
    if not torch.equal(packed.scale.nan_to_num(-1), expected.scale.nan_to_num(-1)):
        return "scales differ"
    if not torch.equal(back.nan_to_num(-1, neginf=-2), wanted.nan_to_num(-1, neginf=-2)):
        return "numbers differ"
    return None if torch.equal(back == -math.inf, x == -math.inf) else "infinities differ"


def main() -> None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    count = 0
    cases = [*itertools.product(RULES, (128,), dtypes, SIZES), (Amax(), 32, torch.bfloat16, 5000)]
    for rule, block, dtype, size in cases:
        spec = QuantSpec(INT8, PerBlock(block), rule)
        found = differs(stretch(size, dtype), spec)
        if found is not None:
            sys.exit(f"{spec}, {size} of {dtype}: {found}")
        count += 1
    print(f"{count} alike")


if __name__ == "__main__":
    main()
