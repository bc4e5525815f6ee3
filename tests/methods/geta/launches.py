# SPDX-License-Identifier: Apache-2.0
"""Cases that hold the kernels to the eager definition. As a program, on CUDA or under Triton's interpreter:

TRITON_INTERPRET=1 python -m tests.methods.geta.launches
"""

from __future__ import annotations

import itertools
import sys
from unittest.mock import patch

import torch
from torch import Tensor, nn

import lowbits.kernels.geta  # noqa: F401  the interpreter's kernels are used where they are loaded
from lowbits.methods import geta
from lowbits.methods.geta import Slope, _launch, quantize
from lowbits.methods.geta._doomed import Doomed
from lowbits.methods.geta._forgetting import Rates
from tests.methods.geta.test_stages import Net
from tests.methods.geta.zoo import Mixed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(1,), (4097,), (3, 1000), (2048, 4096)] if DEVICE == "cuda" else [(2049,)]  # the interpreter takes its time
TYPES = (torch.float32, torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float32, torch.bfloat16)


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


@torch.no_grad()
def check_slices(model: nn.Module, x: Tensor, crossed: bool) -> None:
    """Gather, measure and decay the slices of a third of all units, some of them crossed by others; clear them."""
    graph = geta.trace(model.to(DEVICE), (x.to(DEVICE),))
    zeroed = {m.name for d in graph.dimensions for m in d.members if m.zeroed}
    parameters = {name: p for name, p in model.named_parameters() if name in zeroed}
    layer_of = {name: i for i, name in enumerate(name for name, p in parameters.items() if p.ndim > 1)}
    units = torch.arange(graph.units) % 3 == 1
    scalars = torch.tensor([[0.05, 0.2, 1.0], [0.125, 0.5, 1.0]], device=DEVICE).repeat(len(layer_of), 1)
    found: list[list[Tensor]] = []
    for kernels in (True, False):
        copy = {name: torch.nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
        noise = torch.Generator().manual_seed(1)
        for p in copy.values():
            p.grad = torch.randn(p.shape, generator=noise).to(DEVICE)
        with patch.object(_launch.Table, "takes", staticmethod(lambda _, yes=kernels: yes)):
            doomed = Doomed(graph, copy, layer_of, units)
        assert (doomed.table is not None) == kernels and bool(doomed.own.all()) != crossed
        before = doomed.gather()
        for p in copy.values():
            p.sub_(0.1 * p.grad)
        sums = doomed.products(before, scalars)
        rate = torch.linspace(0.1, 0.9, doomed.dimensions, device=DEVICE)
        step = scalars[:, 0].clone()
        step[0] = torch.nan
        doomed.decay_(before, scalars, Rates(rate, step, rate))
        found.append([before, *sums, *(p.detach().clone() for p in copy.values())])
        if doomed.table is not None:
            doomed.table.clear_()
            assert not doomed.gather().any()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def main() -> None:
    torch.manual_seed(0)
    check_slices(Mixed(), torch.randn(2, 3, 16, 16), crossed=False)
    check_slices(Net(), torch.randn(2, 6), crossed=True)
    for shape, dtype, exponent, slope in itertools.product(SIZES, TYPES, (1.0, 0.7, 1.6), Slope):
        check(shape, dtype, exponent, slope)
    x = torch.tensor([torch.nan, 1.0], device=DEVICE)
    found = quantize(x, *(torch.tensor(v, device=DEVICE) for v in (0.25, 1.5, 1.0)))
    assert found[0].isnan() and found[1] == 1, "what is not a number stays so"
    print("equal")


if __name__ == "__main__":
    sys.exit(main())
