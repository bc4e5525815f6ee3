# SPDX-License-Identifier: Apache-2.0
"""Cases that hold the quantizer's kernels to the eager definition. As a program, on CUDA or under Triton's interpreter:

TRITON_INTERPRET=1 python -m tests.methods.geta.launches
"""

from __future__ import annotations

import itertools
import sys
from unittest.mock import patch

import torch
from torch import Tensor

import lowbits.kernels.geta  # noqa: F401  the interpreter's kernels are used where they are loaded
from lowbits.methods.geta import Slope, _launch, quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(1,), (4097,), (3, 1000), (2048, 4096)] if DEVICE == "cuda" else [(1,), (2049,), (3, 100)]
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def results(x: Tensor, g: Tensor, values: tuple[float, float, float], slope: Slope) -> list[Tensor]:
    """Values, and the gradients of x, step, limit and exponent."""
    x = x.clone().requires_grad_()
    scalars = [torch.tensor(v, device=x.device, requires_grad=True) for v in values]
    y = quantize(x, *scalars, slope)
    y.backward(g)
    found = [y.detach(), *(t.grad for t in (x, *scalars))]
    assert all(t is not None for t in found)
    return found  # type: ignore[return-value]


def check(shape: tuple[int, ...], dtype: torch.dtype, exponent: float, slope: Slope) -> None:
    noise = torch.Generator().manual_seed(0)
    x, g = (torch.randn(shape, generator=noise).to(DEVICE, dtype) for _ in range(2))
    flat = x.view(-1)
    flat[:1] = 0.0
    if x.numel() > 9:  # at the edge, between two codes, beyond
        flat[1:6] = torch.tensor([1.5, -1.5, 0.125, -0.375, 9.0], device=DEVICE)
    values = (0.25, 1.5, exponent)
    assert _launch.launchable(x)
    found = results(x, g, values, slope)
    with patch.object(_launch, "launchable", lambda *_: False):
        want = results(x, g, values, slope)
    exact = exponent == 1.0 or DEVICE == "cuda"  # the interpreter's power is another one
    if exact:
        assert torch.equal(found[0], want[0]), "values"
    assert (found[0] - want[0]).abs().max() <= 0.2501, "values are a step apart at most"
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(found[1], want[1], **close)
    if exact:  # sums in another order
        for a, b in zip(found[2:], want[2:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(g.float().abs().sum()))


def main() -> None:
    for shape, dtype, exponent, slope in itertools.product(SIZES, TYPES, (1.0, 0.7, 1.6), Slope):
        check(shape, dtype, exponent, slope)
    x = torch.tensor([torch.nan, 1.0], device=DEVICE)
    found = quantize(x, *(torch.tensor(v, device=DEVICE) for v in (0.25, 1.5, 1.0)))
    assert found[0].isnan() and found[1] == 1, "what is not a number stays so"
    print("equal")


if __name__ == "__main__":
    sys.exit(main())
