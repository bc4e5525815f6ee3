# SPDX-License-Identifier: Apache-2.0
"""The parameter as torch sees it: gradients, moves, copies, state dicts, safetensors, what is refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowbits.errors import CheckpointError, SpecError
from lowbits.formats import INT8
from lowbits.methods.dqt import quantize_, ternary_
from lowbits.nn import Grid, GridLinear, Packing, QParameter, StepInit, quantize_parameter

GRIDS = [Grid.of(8), Grid.of(4), Grid.of(2), Grid.of(1.58), Grid.of(1.58, Packing.FIVE)]


def model(grid: Grid = GRIDS[0], init: StepInit | None = None, width: int = 20) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(width, 12), nn.LayerNorm(12), nn.Linear(12, 6, bias=False))
    quantize_(made, grid, init)
    return made


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_it_is_a_parameter(grid: Grid) -> None:
    net = model(grid)
    assert isinstance(net[0], GridLinear) and isinstance(net[0].weight, QParameter)
    assert isinstance(net[0].weight, nn.Parameter) and net[0].weight.shape == (12, 20)
    assert net[0].weight.codes.nbytes == 12 * -(-20 // grid.per_byte)
    net(torch.randn(3, 20)).sum().backward()
    assert type(net[0].weight.grad) is torch.Tensor and net[0].weight.grad.shape == (12, 20)
    assert sum(p.numel() for p in net.parameters()) == 12 * 20 + 12 + 24 + 72


def test_it_follows_its_module() -> None:
    net = model()
    codes, p = net[0].weight.codes.clone(), net[0].weight
    net.to(torch.bfloat16)
    assert net[0].weight is p and p.dtype == torch.bfloat16 and p.step.dtype == torch.float32
    assert torch.equal(p.codes, codes)
    net(torch.randn(3, 20, dtype=torch.bfloat16)).sum().backward()
    assert p.grad is not None and p.grad.dtype == torch.bfloat16
    other = copy.deepcopy(net)
    assert torch.equal(other[0].weight.codes, codes) and other[0].weight.codes.data_ptr() != p.codes.data_ptr()
    assert other[0].weight.stream == p.stream == "0.weight"
    assert net.to("meta")[0].weight.codes.is_meta


def test_what_would_write_floats_is_refused() -> None:
    p = model()[0].weight
    with torch.no_grad():
        for write in (lambda: p.normal_(), lambda: p.add_(1.0), lambda: p.mul_(2.0), lambda: p.zero_()):
            with pytest.raises(SpecError, match="codes alone"):
                write()
    with pytest.raises(SpecError, match="codes alone"):
        p.grad = torch.ones(p.shape)
        torch.optim.SGD([p], lr=0.1, foreach=False).step()
    with pytest.raises(SpecError, match="between rows alone"):
        p[:, 1:]


def test_other_operations_see_the_values() -> None:
    p = model()[0].weight
    values = p.dequantize()
    assert (
        torch.equal(p * 2, values * 2)
        and torch.equal(p.t(), values.t())
        and torch.equal(p[3:5].dequantize(), values[3:5])
    )
    assert type(torch.zeros_like(p)) is torch.Tensor and p.norm() == values.norm()
    with torch.no_grad():
        target = quantize_parameter(torch.zeros(12, 20), Grid.of(8))
        target.copy_(p)
        assert torch.equal(target.codes, p.codes) and torch.equal(target.step, p.step)
        target.copy_(values + 0.4 * float(p.step))  # the nearest codes at the own step
        assert torch.equal(target.codes, p.codes)


@pytest.mark.parametrize("init", [StepInit(), StepInit(per_channel=True)], ids=["tensor", "channel"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_state_dict_is_plain_tensors(grid: Grid, init: StepInit, tmp_path: Path) -> None:
    net, other = model(grid, init), model(grid, init)
    with torch.no_grad():
        for p in other.parameters():
            p.codes.zero_() if isinstance(p, QParameter) else p.zero_()
    state = net.state_dict()
    assert all(type(tensor) is torch.Tensor for tensor in state.values())
    assert {"0.weight.codes", "0.weight.step", "0.weight.grid", "0.bias"} <= state.keys() and "0.weight" not in state
    save_file(state, tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = torch.randn(4, 20)
    assert torch.equal(net(x), other(x)) and torch.equal(net[2].weight.step, other[2].weight.step)
    assert state.keys() == net.state_dict().keys()  # loading took nothing away from the caller's


def test_it_can_be_pickled(tmp_path: Path) -> None:
    net = model(Grid.of(1.58))
    torch.save(net.state_dict(), tmp_path / "state.pt")
    net.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert pickle.loads(pickle.dumps(net[0].weight.grid)) == net[0].weight.grid


def test_a_checkpoint_that_does_not_fit_is_refused() -> None:
    """Of another width, packing, granularity or range, with a damaged step, or of floats; nothing is changed then."""
    net = model(Grid.of(1.58))
    before = net[0].weight.codes.clone()

    def refused(state: dict[str, torch.Tensor], words: str) -> None:
        with pytest.raises(CheckpointError, match=words):
            net.load_state_dict(state)
        assert torch.equal(net[0].weight.codes, before)

    refused(model(Grid.of(2)).state_dict(), r"0.weight.grid: the checkpoint has .*-2, 1")
    refused(model(Grid.of(1.58, Packing.FIVE)).state_dict(), "0.weight.grid")
    refused(model(Grid.of(1.58), StepInit(per_channel=True)).state_dict(), "0.weight.step")
    state = net.state_dict()
    refused({**state, "0.weight.step": torch.tensor(0.0)}, "0.weight.step: positive and finite")
    refused({**state, "0.weight.step": torch.tensor(float("nan"))}, "0.weight.step: positive and finite")
    refused({**state, "0.weight.codes": torch.full_like(before, 0xAA)}, "within -1 .. 1, got -2")
    floats = nn.Sequential(nn.Linear(20, 12), nn.LayerNorm(12), nn.Linear(12, 6, bias=False)).state_dict()
    refused(floats, "has a float tensor")
    with pytest.raises(RuntimeError, match="0.weight"):
        net.load_state_dict({k: v for k, v in state.items() if not k.startswith("0.weight")})


def test_ternary_export() -> None:
    """U12: packed bytes, the round trip, and logits of the float emulation."""
    net = model(Grid(INT8))
    values = net[0].weight.dequantize()
    g = values.abs().mean().clamp_min(1e-5)
    assert ternary_(net) == ["0.weight", "2.weight"]
    p = net[0].weight
    assert p.stored_bytes == 12 * 5 + 4 and float(p.step) == pytest.approx(float(g), rel=1e-6)
    emulated = (values / g).round().clamp(-1, 1) * g
    assert torch.allclose(p.dequantize(), emulated, rtol=1e-6)
    other = model(Grid.of(1.58))
    other.load_state_dict(net.state_dict())
    x = torch.randn(5, 20)
    assert torch.equal(other(x), net(x))
    sx = 127 / x.abs().amax(1, keepdim=True)
    hidden = (x * sx).round() / sx @ emulated.t() + net[0].bias
    assert torch.allclose(net[0](x), hidden, atol=1e-5)
    before = other[0].weight.step.clone()
    assert ternary_(other) == [] and torch.equal(other[0].weight.step, before)  # a ternary model keeps its step


def test_words_of_a_parameter_need_no_numbers() -> None:
    """torch 2.11 asks for them while it compiles, of tensors that have none."""
    parameter = quantize_parameter(torch.randn(4, 8), Grid.of(8), StepInit())
    assert f"step {float(parameter.step):.3g}" in repr(parameter)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(parameter)
        assert "step unknown" in repr(fake)
