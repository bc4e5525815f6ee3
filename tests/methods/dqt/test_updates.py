# SPDX-License-Identifier: Apache-2.0
"""Updates of codes: the published rule in float64, every optimizer, random bits, resume, degenerate tensors, bytes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from lowbits import optim
from lowbits.nn import Grid, Packing, QParameter, Scaling, StepInit, StepRule, quantize_parameter
from lowbits.optim import AdamW, CodecOptimizer, step_in_backward
from lowbits.quantizers import Noise, Rounding
from tests.oracles import direct_quantized as oracle

GRIDS = [Grid.of(8), Grid.of(4), Grid.of(2), Grid.of(1.58), Grid.of(1.58, Packing.FIVE)]
Make = Callable[[list[nn.Parameter]], CodecOptimizer]
OPTIMIZERS: dict[str, Make] = {
    "AdamW": lambda p: AdamW(p, lr=1e-3),
    "AdamW8bit": lambda p: optim.AdamW8bit(p, lr=1e-3),
    "AdamW4bit": lambda p: optim.AdamW4bit(p, lr=1e-3),
    "Adafactor": lambda p: optim.Adafactor(p, lr=1e-1, beta1=0.9),
    "SGD": lambda p: optim.SGD(p, lr=1.0, momentum=0.9),
    "SGD8bit": lambda p: optim.SGD8bit(p, lr=1.0, momentum=0.9),
    "Lion": lambda p: optim.Lion(p, lr=1e-3),
    "Lion8bit": lambda p: optim.Lion8bit(p, lr=1e-3),
}


def parameter(grid: Grid = GRIDS[0], shape: tuple[int, ...] = (64, 80), name: str = "w", seed: int = 0) -> nn.Parameter:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    made = quantize_parameter(weight, grid)
    made.stream = name
    return nn.Parameter(made)


def gradient(shape: tuple[int, ...], step: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + step)) * 0.01


def train(p: nn.Parameter, optimizer: CodecOptimizer, steps: range) -> None:
    for step in steps:
        p.grad = gradient(tuple(p.shape), step)
        optimizer.step()


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.packing is not Packing.FIVE], ids=str)
def test_a_step_is_the_published_one(grid: Grid) -> None:
    """AdamW and the write-back in float64; a draw within float32's error of its fraction may fall to either side."""
    p = parameter(grid, (20, 24))
    optimizer = AdamW([p], lr=2e-3, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, seed=5)
    codes, step = p.unpacked().flatten().tolist(), float(p.step)
    m, v = [0.0] * len(codes), [0.0] * len(codes)
    for t in range(1, 4):
        p.grad = gradient((20, 24), t)
        optimizer.step()
        draws = Noise.of(5, "w", "weight").uniform((len(codes),), t).tolist()
        new = []
        for i, g in enumerate(p.grad.flatten().tolist()):
            w, m[i], v[i] = oracle.adamw(codes[i] * step, g, m[i], v[i], t, 2e-3, (0.9, 0.99), 1e-6, 0.1)
            new.append(w)
        want = oracle.write_back(codes, new, step, grid.low, grid.high, draws)
        got = p.unpacked().flatten().tolist()
        close = [abs((w / step) % 1 - u) < 1e-4 for w, u in zip(new, draws, strict=True)]
        assert all(a == b or near for a, b, near in zip(got, want, close, strict=True)) and sum(close) < 3
        assert got != codes
        codes = got


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_every_grid(name: str, grid: Grid) -> None:
    """Towards a target that the grid can hold: the distance falls by a third."""
    p = parameter(grid)
    target = parameter(grid, seed=1).dequantize()
    optimizer = OPTIMIZERS[name]([p])
    before = float((p.dequantize() - target).norm())
    for step in range(60):
        p.grad = p.dequantize() - target
        for group in optimizer.param_groups:
            group["lr"] *= 1 if step < 30 else 0.9
        optimizer.step()
    assert float((p.dequantize() - target).norm()) < before * 2 / 3
    assert p.grid.low <= int(p.unpacked().min()) and int(p.unpacked().max()) <= p.grid.high


@pytest.mark.parametrize(("grid", "dtype"), [(GRIDS[0], torch.bfloat16), (GRIDS[4], torch.float32)], ids=str)
def test_without_gradient_no_code_moves(grid: Grid, dtype: torch.dtype) -> None:
    """U3: 1000 steps without decay, in every environment."""
    p = nn.Parameter(parameter(grid, (8, 20)).detach().to(dtype))
    before, optimizer = p.codes.clone(), optim.Lion([p], lr=0.1, weight_decay=0.0)
    p.grad = torch.zeros(8, 20, dtype=dtype)
    for _ in range(1000):
        optimizer.step()
    assert torch.equal(p.codes, before)


def test_without_gradient_no_code_moves_whatever_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """U3: D q / D is not always q in floats; a draw of 0 rounds all that lies above an integer up."""
    monkeypatch.setattr(Noise, "uniform", lambda *_, **__: torch.zeros(64, 256))
    steps = torch.rand(64, generator=torch.Generator().manual_seed(0)) + 1e-3
    p = nn.Parameter(QParameter.of(torch.arange(-128, 128, dtype=torch.int8).repeat(64, 1), steps, GRIDS[0]))
    before, p.grad = p.codes.clone(), torch.zeros(64, 256)
    assert ((p.dequantize() / p.step) % 1 > 0).any()
    optim.Lion([p], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(p.codes, before)


def test_rounding_to_nearest_loses_small_steps() -> None:
    """R7: steps of 0.3 codes vanish under nearest and arrive in the mean under stochastic rounding."""
    moved = {}
    for rounding in (Rounding.NEAREST, Rounding.STOCHASTIC):
        p = nn.Parameter(quantize_parameter(torch.zeros(100, 100), Grid.of(8, rounding=rounding)))
        optimizer = optim.SGD([p], lr=1.0)
        for _ in range(20):
            p.grad = torch.full((100, 100), -0.3 * float(p.step))
            optimizer.step()
        moved[rounding] = float(p.unpacked().double().mean())
    assert moved[Rounding.NEAREST] == 0
    assert abs(moved[Rounding.STOCHASTIC] - 6) < 4 * (20 * 0.21 / 10_000) ** 0.5


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_random_bits_do_not_depend_on_company(grid: Grid) -> None:
    """U9: the same codes alone, in another order, beside others, and cut into chunks of the draw."""
    alone = parameter(grid, name="a")
    train(alone, AdamW([alone], lr=1e-3), range(3))
    ours, other, third = parameter(grid, name="a"), parameter(grid, name="b"), nn.Parameter(torch.zeros(3))
    optimizer = AdamW([{"params": [third, other]}, {"params": [ours], "weight_decay": 0.01}], lr=1e-3)
    for step in range(3):
        other.grad, third.grad = gradient((64, 80), 7), torch.ones(3)
        ours.grad = gradient((64, 80), step)
        optimizer.step()
    assert torch.equal(ours.codes, alone.codes) and not torch.equal(other.codes, alone.codes)


def test_draws_of_chunks_steps_and_parameters() -> None:
    """U9: four chunks are the whole; other steps, names and seeds are not correlated."""
    noise, count = Noise.of(0, "w", "weight"), 40_000
    whole = noise.uniform((count,), 3)
    chunks = [noise.uniform((count // 4,), 3, offset=i * count // 4) for i in range(4)]
    assert torch.equal(torch.cat(chunks), whole)
    others = [noise.uniform((count,), 4), Noise.of(0, "v", "weight").uniform((count,), 3)]
    others.append(Noise.of(1, "w", "weight").uniform((count,), 3))
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([whole, other]))[0, 1])) < 0.02  # four standard errors


def test_a_compiled_rule_draws_the_same() -> None:
    """U9: the write-back compiled and eager."""
    from lowbits.nn import moved

    p = parameter()
    draw = Noise.of(0, "w", "weight").uniform(tuple(p.shape), 1)
    change = gradient((64, 80), 0)
    compiled = torch.compile(moved, backend="aot_eager")
    assert torch.equal(
        compiled(p.unpacked(), change, p.step, p.grid, draw), moved(p.unpacked(), change, p.step, p.grid, draw)
    )


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "AdamW4bit", "Adafactor"])
def test_a_resumed_run_has_the_same_bits(name: str) -> None:
    """U10: from codes, moments, seed and step."""
    p = parameter()
    optimizer = OPTIMIZERS[name]([p])
    train(p, optimizer, range(3))
    codes, state = p.codes.clone(), optimizer.state_dict()
    state = {**state, "state": {k: {n: t.clone() for n, t in s.items()} for k, s in state["state"].items()}}
    train(p, optimizer, range(3, 6))
    again = parameter()
    again.codes.copy_(codes)
    resumed = OPTIMIZERS[name]([again])
    resumed.load_state_dict(state)
    train(again, resumed, range(3, 6))
    assert torch.equal(again.codes, p.codes)


@pytest.mark.parametrize("kind", ["zeros", "negative", "constant", "one"])
@pytest.mark.parametrize("name", ["AdamW", "Adafactor"])
def test_degenerate_tensors_train(name: str, kind: str) -> None:
    """U11: towards a target of both signs; finite, and not all of one value at the end."""
    shapes = {"one": (1, 1)}
    start = {"zeros": 0.0, "negative": -0.3, "constant": 0.3, "one": 0.3}[kind]
    shape = shapes.get(kind, (16, 16))
    weight = torch.full(shape, start)
    target = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02 + 0.6 * start
    for bits in (8, 1.58):
        p = nn.Parameter(quantize_parameter(weight, Grid.of(bits), StepInit(StepRule.ABSMAX)))
        optimizer = OPTIMIZERS[name]([p])
        before = float((p.dequantize() - target).abs().mean())
        for step in range(200):
            p.grad = p.dequantize() - target
            optimizer.param_groups[0]["lr"] = (1e-3 if name == "AdamW" else 1e-1) * (1 - step / 200)
            optimizer.step()
        values = p.dequantize()
        assert values.isfinite().all() and (kind == "one" or len(values.unique()) > 1)
        if bits == 8:
            assert float((values - target).abs().mean()) < before


def test_published_scaling_shrinks_and_guards() -> None:
    """D <- D max(q) / high before the update; where no code is positive the published division has no meaning."""
    grid = Grid(Grid.of(8).format, scaling=Scaling.RECOMPUTED)
    p = nn.Parameter(QParameter.of(torch.tensor([[100, -50, 3, 0]], dtype=torch.int8), torch.tensor(0.127), grid))
    p.grad = torch.zeros(1, 4)
    AdamW([p], lr=1e-3, weight_decay=0.0).step()
    assert float(p.step) == pytest.approx(0.1)
    assert int(p.unpacked()[0, 0]) == 127 and int(p.unpacked()[0, 1]) in (-64, -63)
    negative = nn.Parameter(QParameter.of(-torch.ones(2, 4, dtype=torch.int8), torch.tensor(0.1), grid))
    negative.grad = torch.zeros(2, 4)
    AdamW([negative], lr=1e-3, weight_decay=0.0).step()
    assert float(negative.step) == pytest.approx(0.1) and torch.equal(
        negative.unpacked(), -torch.ones(2, 4).to(torch.int8)
    )


def floats_of_size(sizes: set[int]) -> Iterator[Tensor]:
    """Plain float tensors alive now with as many elements as a weight."""
    gc.collect()
    for found in gc.get_objects():
        if type(found) in (Tensor, nn.Parameter) and found.is_floating_point() and found.numel() in sizes:
            yield found


@pytest.mark.parametrize(
    ("name", "grid"),
    [*(("AdamW8bit", grid) for grid in GRIDS), ("AdamW4bit", GRIDS[3]), ("Lion8bit", GRIDS[0])],
    ids=str,
)
def test_no_float_of_a_weights_size_lives_between_steps(name: str, grid: Grid) -> None:
    """U5, U14: in the backward pass, with moments in codes; and the bytes of every storage, added up."""
    from lowbits.nn import GridLinear, grid_linear_

    torch.manual_seed(0)
    net = nn.Sequential(*[grid_linear_(nn.Linear(200, 200, bias=False), grid) for _ in range(2)])
    assert all(isinstance(layer, GridLinear) for layer in net)
    optimizer = OPTIMIZERS[name](list(net.parameters()))
    handle = step_in_backward(net, optimizer)
    for _ in range(2):
        net(torch.randn(3, 200)).square().sum().backward()
    assert list(floats_of_size({200 * 200})) == []
    held = sum(t.untyped_storage().nbytes() for p in net.parameters() for t in (p.codes, p.step))
    assert held == sum(p.stored_bytes for p in net.parameters()) == 2 * (200 * grid.row_bytes(200) + 4)
    moments = {"AdamW8bit": 2 * (1 + 4 / 256), "AdamW4bit": 2 * (0.5 + 4 / 128), "Lion8bit": 1 + 4 / 256}[name]
    state = sum(t.untyped_storage().nbytes() for s in optimizer.state.values() for t in s.values())
    assert state / 80_000 == pytest.approx(moments, rel=0.01)
    handle.remove()


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "Adafactor"])
def test_updates_in_backward_are_the_same(name: str) -> None:
    from lowbits.nn import grid_linear_

    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(nn.Sequential(*[grid_linear_(nn.Linear(32, 32), Grid.of(4)) for _ in range(2)]))
    optimizers = [OPTIMIZERS[name](list(net.parameters())) for net in nets]
    handle = step_in_backward(nets[0], optimizers[0])
    x = torch.randn(5, 32)
    for _ in range(4):
        for net, optimizer in zip(nets, optimizers, strict=True):
            net(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a[i].weight.codes, b[i].weight.codes) for a, b in [nets] for i in range(2))
    handle.remove()
