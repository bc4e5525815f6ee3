# SPDX-License-Identifier: Apache-2.0
"""Cases that hold the kernel of levels to the eager definition, bit for bit.

Run as a program, on CUDA, on a CPU under Triton's interpreter, or to compile for a GPU that is not there:

    TRITON_INTERPRET=1 python -m tests.methods.distillation.levels_launches [CASE ...]
    python -m tests.methods.distillation.levels_launches compile
"""

from __future__ import annotations

import sys
from unittest.mock import patch

import torch
from torch import Tensor

import lowbits.kernels.levels  # noqa: F401  the interpreter's kernels are used where they are loaded
from lowbits.export import Buckets
from lowbits.methods import _levels, _levels_launch
from lowbits.methods.distillation import Levels, encode, round_to_levels
from lowbits.quantizers import Noise, PerBlock, PerGroup, PerRow, PerTensor, Rounding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTS = {2: torch.int16, 4: torch.int32}
SHAPES = {"cpu": [(5, 70), (3, 2, 3, 3), (1,)], "cuda": [(5, 70), (3, 2, 3, 3), (1,), (4096, 1000), (257, 30_001)]}

CASES: dict[str, tuple[int, Buckets, torch.dtype]] = {
    "published": (16, PerBlock(256), torch.float32),
    "blocks of 64": (4, PerBlock(64), torch.float32),
    "blocks of 7": (3, PerBlock(7), torch.float32),
    "groups": (4, PerGroup(16), torch.float32),
    "rows": (300, PerRow(), torch.float32),
    "tensor": (2, PerTensor(), torch.float32),
    "bfloat16": (16, PerBlock(64), torch.bfloat16),
    "float16": (16, PerBlock(64), torch.float16),
}


def weight(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal, with a constant stretch, both zeros, and (in the longest) one that is no number."""
    w = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    flat = w.view(-1)
    flat[8:24] = 0.5
    flat[:1] = -0.0
    if flat.numel() > 300:
        flat[300], flat[100] = torch.nan, torch.inf
    return w.to(dtype)


def same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors have the same bits; one NaN is another."""
    x, y = x.nan_to_num(nan=77.0), y.nan_to_num(nan=77.0)
    return x.dtype == y.dtype and torch.equal(x.view(INTS[x.element_size()]), y.view(INTS[y.element_size()]))


def difference(count: int, buckets: Buckets, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """What differs between kernel and definition; the definition runs on the CPU."""
    w = weight(shape, dtype)
    counter = torch.tensor([(1 << 33) + 7, *Noise.of(3, "w", "levels").key])
    for rounding, noise in ((Rounding.NEAREST, None), (Rounding.STOCHASTIC, counter)):
        levels = Levels(count, buckets, rounding)
        with patch.object(_levels, "launched", lambda *_: None):
            expected = round_to_levels(w, levels, noise)
        on = w.to(DEVICE), None if noise is None else noise.to(DEVICE)
        direct = _levels_launch.launched(on[0], count, buckets, on[1])
        if direct is None and w.numel() <= 1 << 14:
            return f"{shape}: was not launched"
        found = round_to_levels(on[0], levels, on[1])  # where the kernel does not reach, the definition on the device
        if not same(expected, found.cpu()) or (direct is not None and not same(expected, direct.cpu())):
            return f"{shape}, {rounding.value}: {int((expected != found.cpu()).sum())} of {w.numel()}"
    finite = w.nan_to_num(0.0, 0.0, 0.0).to(DEVICE)
    if not same(encode(finite, Levels(count, buckets)).dequantize(), round_to_levels(finite, Levels(count, buckets))):
        return f"{shape}: what is stored is not what is trained on"
    return None


def compiled() -> None:
    """Compile every case for an H100 or H200."""
    from tests.kernels.compiling import compiling

    with compiling() as seen, patch.object(_levels_launch, "usable", lambda _: True):
        for count, buckets, dtype in CASES.values():
            for noise in (None, torch.tensor([1, 2, 3])):
                assert _levels_launch.launched(torch.zeros(64, 200, dtype=dtype), count, buckets, noise) is not None
    print(f"compiled: {len(seen)} kernels")


def main() -> None:
    wanted, failed = sys.argv[1:], 0
    if wanted == ["compile"]:
        return compiled()
    for name, (count, buckets, dtype) in CASES.items():
        if wanted and name not in wanted:
            continue
        found = next((d for shape in SHAPES[DEVICE] if (d := difference(count, buckets, dtype, shape))), None)
        failed += found is not None
        print(f"{name}: {found or 'equal'}", flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
