# SPDX-License-Identifier: Apache-2.0
"""A CUDA device computes the CPU's layers and codes, bit for bit, and holds the bytes that it is said to."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from lowbits import optim
from lowbits.methods.dqt import materialize_, ternary_
from lowbits.nn import Execution, Grid, GridLinear, Packing, StepInit, grid_linear_, quantize_parameter
from lowbits.optim import step_in_backward

DEVICE = "cuda"
GRIDS = [Grid.of(8), Grid.of(4), Grid.of(1.58), Grid.of(1.58, Packing.FIVE)]

pytestmark = pytest.mark.gpu


def layers(grid: Grid, init: StepInit, execution: Execution) -> tuple[GridLinear, GridLinear]:
    torch.manual_seed(0)
    here = grid_linear_(nn.Linear(40, 24, bias=False), grid, init, execution=execution)
    there = grid_linear_(nn.Linear(40, 24, bias=False), grid, init, execution=execution)
    there.load_state_dict(here.state_dict())
    return here, there.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init", [StepInit(), StepInit(per_channel=True)], ids=["tensor", "channel"])
@pytest.mark.parametrize("execution", Execution)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_layer_is_the_same(grid: Grid, execution: Execution, init: StepInit, dtype: torch.dtype) -> None:
    """Sums of 40 products stay below 2^24, so they are exact in any order; gradients are not."""
    here, there = layers(grid, init, execution)
    for tokens in (1, 9, 64):
        x = torch.randn(tokens, 40, generator=torch.Generator().manual_seed(tokens)).to(dtype).requires_grad_()
        x_there = x.detach().to(DEVICE).requires_grad_()
        y, y_there = here(x), there(x_there)
        assert torch.equal(y, y_there.cpu()) and y_there.dtype == dtype
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        y.backward(g)
        y_there.backward(g.to(DEVICE))
        for a, b in ((x.grad, x_there.grad), (here.weight.grad, there.weight.grad)):
            assert a is not None and b is not None
            torch.testing.assert_close(a, b.cpu(), rtol=2**-6 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "AdamW4bit", "Lion8bit", "SGD8bit", "Adafactor"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_updates_come_to_the_same_codes(name: str, grid: Grid) -> None:
    """Fused on CUDA, eager on the CPU; Adafactor, eager on both, sums a whole tensor in another order."""
    weight = torch.randn(128, 160, generator=torch.Generator().manual_seed(0)) * 0.02
    more = {"momentum": 0.9} if name == "SGD8bit" else {}
    found = []
    for device in ("cpu", DEVICE):
        p = nn.Parameter(quantize_parameter(weight, grid).to(device))
        optimizer = getattr(optim, name)([p], lr=1e-2, **more)
        for step in range(3):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(device)
            optimizer.step()
        found.append(p.unpacked().cpu())
    different = int((found[0] != found[1]).sum())
    assert different <= (found[0].numel() // 1000 if name == "Adafactor" else 0)


class Stack(nn.Module):
    """Four layers of a million weights each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


def held(grid: Grid) -> tuple[float, float]:
    """Bytes a weight of a model as it was drawn, and after two steps in backward with 8-bit moments."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    with torch.device("meta"):
        model = Stack()
    materialize_(model, grid, DEVICE)
    drawn = torch.cuda.memory_allocated() - before
    optimizer = optim.AdamW8bit(model.parameters(), lr=1e-3)
    handle = step_in_backward(model, optimizer)
    for _ in range(2):
        model(torch.randn(64, 1024, device=DEVICE, dtype=torch.bfloat16)).backward()
    trained = torch.cuda.memory_allocated() - before
    handle.remove()
    assert len(ternary_(model)) == (4 if grid.per_byte == 1 else 0)
    return drawn / 2**22, trained / 2**22


@pytest.mark.parametrize(("grid", "limit"), [(Grid.of(8), 3.2), (Grid.of(1.58), 2.5)], ids=str)
def test_bytes_a_parameter(grid: Grid, limit: float) -> None:
    """Drawn where they stay. The first time the libraries take their workspaces."""
    held(grid)
    drawn, trained = held(grid)
    assert drawn == pytest.approx(1 / grid.per_byte, rel=0.01)
    assert trained <= limit
