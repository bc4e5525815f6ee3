# SPDX-License-Identifier: Apache-2.0
"""The noisy weight and its gradients: B4 to B7, B11, B12 and B14 of the specification."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from lowbits.errors import FormatError, SpecError
from lowbits.methods._pseudo_noise._numerics import backward, exp2, forward, without_noise
from lowbits.methods._pseudo_noise._weight import _Noisy, _NoisyThroughMax
from lowbits.methods.gaussws import (
    Fidelity,
    GaussWS,
    NoisyWeight,
    Operator,
    Plan,
    PseudoNoise,
    Regulariser,
    Storage,
    add_noise_,
    bit_penalty,
    noisy,
    set_draw_,
)
from lowbits.nn import Recipe, convert_, high_precision
from lowbits.optim import AdamW
from lowbits.recipes import named
from tests.oracles import gaussws as oracle

KEY = (11, 12)
EXACT = Plan(operator=Operator.FP32)


def counter(number: int = 4) -> Tensor:
    return torch.tensor([number, *KEY])


def fixed_noise(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Let R be one number everywhere."""
    from lowbits.methods._pseudo_noise import _numerics

    def same(noise: object, fidelity: object, counts: tuple[int, int], block: tuple[int, int], *rest: object) -> Tensor:
        return torch.full((*counts, block[0] * block[1]), value)

    monkeypatch.setattr(_numerics, "draw", same)


def noised(w: Tensor, bits: float, plan: Plan = EXACT) -> Tensor:
    """W^ where b_t is `bits` everywhere."""
    blocks = (-(-w.shape[0] // plan.block[0]), -(-w.shape[1] // plan.block[1]))
    b_i = torch.full(blocks, (bits - plan.b_target) / plan.span)
    return forward(w, b_i, counter(), plan)[0]


def test_e1_a_step_of_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.tensor([[0.8, 0.33]])
    fixed_noise(monkeypatch, -2.0)
    assert torch.equal(noised(w, 4.0), w - 2 * w.new_tensor(0.1))  # 0.33 -> 0.13, in float32
    assert noised(w, 4.0)[0, 1].item() == pytest.approx(0.13, abs=2e-8)
    fixed_noise(monkeypatch, 1.0)
    assert torch.equal(noised(w, 6.0), w + w.new_tensor(0.8) * 2.0**-5)


def test_e2_gradients_of_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """b_i = 0.5: b_t = 5, D = 0.05, and with sum G R = 3 the published gradient of b_i."""
    fixed_noise(monkeypatch, 1.0)
    w, b_i = torch.tensor([[0.8, 0.1]], dtype=torch.float64), torch.tensor([[0.5]], dtype=torch.float64)
    y, slope = forward(w, b_i, counter(), EXACT)
    assert (y - w)[0, 0].item() == pytest.approx(0.05, abs=1e-15)
    gradient = backward(torch.tensor([[1.0, 2.0]], dtype=torch.float64), slope, counter(), EXACT)
    assert gradient.item() == pytest.approx(-0.207944, abs=5e-7)
    assert gradient.item() / 2 == pytest.approx(-0.103972, abs=5e-7)


def test_e3_what_bfloat16_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    one = torch.ones(1, 1)
    plan = Plan(b_init=10.0, operator=Operator.FP16)  # so that ten bits are not clamped
    kept = {}
    for r in (1.0, -1.0):
        fixed_noise(monkeypatch, r)
        for bits in (8.0, 9.0, 10.0):
            wide = noised(one, bits, plan)
            kept[bits, r] = wide.to(torch.bfloat16).item()
    assert kept == {
        (8.0, 1.0): 1.0078125,
        (8.0, -1.0): 1 - 2**-7,
        (9.0, 1.0): 1.0,  # a tie, to even
        (9.0, -1.0): 0.99609375,
        (10.0, 1.0): 1.0,
        (10.0, -1.0): 1.0,  # a tie, to even
    }


@pytest.mark.parametrize("shape", [(1, 1), (32, 32), (33, 31), (64, 70), (5, 200)])
@pytest.mark.parametrize("block", [(32, 32), (16, 8), (7, 5)])
def test_the_definition_is_the_oracles(shape: tuple[int, int], block: tuple[int, int]) -> None:
    """B4 and B5 in float64, partial blocks at the edges."""
    if shape[0] * shape[1] > 2000 and block != (32, 32):
        pytest.skip("the oracle takes its time")
    plan = replace(EXACT, block=block)
    w = torch.randn(shape, dtype=torch.float64)
    b_i = torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1]), dtype=torch.float64) * 2
    r = oracle.noise(shape, block, 4, KEY)
    y, slope = forward(w, b_i, counter(), plan)
    expected = oracle.forward(w.numpy(), b_i.numpy(), r, block, 6, 4, 25)
    assert np.allclose(y.numpy(), expected, rtol=0, atol=1e-14)
    g = torch.randn(shape, dtype=torch.float64)
    gradient = oracle.bit_gradient(g.numpy(), w.numpy(), b_i.numpy(), r, block, 6, 4)
    assert np.allclose(backward(g, slope, counter(), plan).numpy(), gradient, rtol=1e-12, atol=1e-13)


def autograd_gradient(w: Tensor, b_i: Tensor, g: Tensor, plan: Plan) -> Tensor:
    """What autograd makes of the formula, M held fixed; for one block."""
    r = torch.from_numpy(oracle.noise(tuple(w.shape), plan.block, 4, KEY)).to(w.dtype)  # type: ignore[arg-type]
    b_i = b_i.clone().requires_grad_()
    bits = (plan.b_target + b_i * plan.span).clamp(2, plan.most_bits)
    y = w + r * (w.abs().max().detach() * 2 ** (1 - bits))
    (gradient,) = torch.autograd.grad((y * g).sum(), b_i)
    return gradient


@pytest.mark.parametrize("b_i", [0.3, 1.0, -0.5, -1.5, 11.0])
def test_b5_gradients_against_autograd(b_i: float) -> None:
    """Within the bounds and beyond them, where the gradient is 0."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        w, g, bits = (
            torch.randn(32, 32, dtype=dtype),
            torch.randn(32, 32, dtype=dtype),
            torch.full((1, 1), b_i).to(dtype),
        )
        _, slope = forward(w, bits, counter(), EXACT)
        found, expected = backward(g, slope, counter(), EXACT), autograd_gradient(w, bits, g, EXACT)
        assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
        assert (float(expected) == 0) == (b_i in (-1.5, 11.0))


def test_b5_the_weights_gradient_is_the_output_s() -> None:
    w, b_i = torch.randn(40, 40, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    g = torch.randn(40, 40).bfloat16()
    for dtype in (torch.bfloat16, torch.float32):
        y = _Noisy.apply(w, b_i, counter(), Plan().text, (0, 0), dtype)
        (dw, _) = torch.autograd.grad(y, (w, b_i), g.to(dtype))
        assert torch.equal(dw, g.float())


def test_b6_what_the_bits_learn() -> None:
    """E[dL/db] = -ln 2 Var(R) D^2 sum h on a quadratic, within four standard errors."""
    w, h = torch.randn(32, 32, dtype=torch.float64), torch.rand(32, 32, dtype=torch.float64)
    b_i, plan = torch.full((1, 1), 0.5, dtype=torch.float64), EXACT
    found = []
    for number in range(400):
        at = counter(number)
        y, slope = forward(w, b_i, at, plan)
        found.append(backward(h * (y - w), slope, at, plan).item() / plan.span)
    mean, error = np.mean(found), np.std(found) / len(found) ** 0.5
    delta = oracle.step(w.abs().max().item(), 0.5, 6, 4, 25)
    expected = -math.log(2) * Fidelity.DEFAULT.variance * delta**2 * h.sum().item()
    assert abs(mean - expected) < 4 * error and error < abs(expected) / 12


def test_zero_and_broken_blocks() -> None:
    w = torch.randn(64, 64)
    w[:32, :32] = 0
    y, slope = forward(w, torch.ones(2, 2), counter(), Plan())
    assert not bool(y[:32, :32].any()) and slope[0, 0] == 0 and bool((slope[1:] != 0).all())
    for bad in (math.nan, math.inf, -math.inf):
        weight = NoisyWeight((64, 64), Plan(), seed=0, name="h.0.mlp")
        broken = w.clone()
        broken[40, 5] = bad
        with pytest.raises(FormatError, match=r"h\.0\.mlp: block \(1, 0\) of its weight is not finite"):
            weight(broken)


def test_bits_stay_within_their_bounds() -> None:
    plan = Plan()
    weight = NoisyWeight((64, 64), plan, seed=0, name="a")
    with torch.no_grad():
        weight.b_i.copy_(torch.tensor([[-3.0, 1.0], [2.0, 9.0]]))  # type: ignore[union-attr]
    assert weight.bits().tolist() == [[2.0, 6.0], [8.0, 9.0]] and plan.most_bits == 9
    assert replace(plan, storage=Storage.E3M2).most_bits == 4 and replace(plan, operator=Operator.FP16).most_bits == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_powers_of_two(dtype: torch.dtype) -> None:
    x = torch.linspace(-24, 1, 5001, dtype=dtype)
    ulps = 4 if dtype == torch.float32 else 8
    assert torch.allclose(exp2(x), torch.exp2(x.double()).to(dtype), rtol=ulps * torch.finfo(dtype).eps, atol=0)
    whole = torch.arange(-24.0, 2, dtype=dtype)
    assert torch.equal(exp2(whole), torch.exp2(whole))


def network(plan: Plan, *, lean: bool = False, recipe: str = "bf16", draw: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 40))
    convert_(model, named(recipe), verbose=False)
    add_noise_(model, plan, seed=1, lean=lean)
    set_draw_(noisy(model), draw)
    return model


def results(
    model: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], *, autocast: bool = True
) -> list[Tensor]:
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    y.float().square().sum().backward()
    return [y, x.grad, *(p.grad for p in parameters)]  # type: ignore[list-item]


@pytest.mark.filterwarnings("ignore")  # of torch, from inside dynamo
@pytest.mark.parametrize("recipe", ["bf16", "w8a8"])
def test_b7_the_backward_pass_draws_the_same(recipe: str) -> None:
    """Kept, made again, under recomputation, and compiled: the same bits, gradients of the bits included."""
    kept = network(Plan(), recipe=recipe)
    expected = results(kept, list(kept.parameters()))
    lean = network(Plan(), lean=True, recipe=recipe)
    again = network(Plan(), recipe=recipe)

    def recomputed(x: Tensor) -> Tensor:
        y = torch.utils.checkpoint.checkpoint(again, x, use_reentrant=False)
        assert isinstance(y, Tensor)
        return y

    runs: list[tuple[Callable[[Tensor], Tensor], nn.Module]] = [(lean, lean), (recomputed, again)]
    if recipe == "bf16":
        for compiled in (network(Plan()), network(Plan(), lean=True)):
            runs.append((torch.compile(compiled, fullgraph=True, backend="aot_eager"), compiled))
    for function, module in runs:
        found = results(function, list(module.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore")  # of torch, from inside dynamo
def test_lean_makes_weights_again_and_no_products_when_compiled() -> None:
    """Two products a layer in backward, three would be one too many; and nothing of a weight's size is kept."""
    graphs: list[torch.fx.GraphModule] = []

    def kept(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=kept, partition_fn=min_cut_rematerialization_partition)
    model = network(Plan(), lean=True)
    results(torch.compile(model, fullgraph=True, backend=backend), list(model.parameters()))
    calls = [[str(node.target) for node in graph.graph.nodes if node.op == "call_function"] for graph in graphs]
    assert len(graphs) == 2 and sum("add_pseudo_noise" in name for name in calls[1]) == 2
    assert [sum("mm" in name for name in names) for names in calls] == [2, 4]
    outputs = [node.meta["val"] for node in list(graphs[0].graph.nodes)[-1].args[0] if hasattr(node, "meta")]
    sizes = [x.numel() for x in outputs if isinstance(x, Tensor) and x.dtype == torch.bfloat16]
    assert sizes and not {64 * 96, 96 * 40} & set(sizes)


@pytest.mark.filterwarnings("ignore")  # of torch, from inside dynamo
def test_compiled_gradients_that_have_the_weights_type_pass_as_they_are() -> None:
    """No autocast: G is float32 like W, and the compiled operator may not return its own argument."""
    kept, other = network(Plan()), network(Plan())
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    expected = results(kept, list(kept.parameters()), autocast=False)
    found = results(compiled, list(other.parameters()), autocast=False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_draw_between_forward_and_backward_is_noticed() -> None:
    model = network(Plan())
    y = model(torch.randn(4, 64))
    set_draw_(noisy(model), 4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_b7_shards_add_the_same_noise() -> None:
    w, b_i = torch.randn(128, 128), torch.rand(4, 4)
    whole, slopes = forward(w, b_i, counter(), Plan())
    g = torch.randn(128, 128)
    gradient = backward(g, slopes, counter(), Plan())
    for axis in (0, 1):
        for k in range(2):
            part = [slice(None), slice(None)]
            part[axis] = slice(64 * k, 64 * (k + 1))
            blocks, origin = [slice(None), slice(None)], [0, 0]
            blocks[axis], origin[axis] = slice(2 * k, 2 * (k + 1)), 2 * k
            where, inside, at = tuple(part), tuple(blocks), (origin[0], origin[1])
            y, own = forward(w[where].contiguous(), b_i[inside], counter(), Plan(), at)
            assert torch.equal(y, whole[where]) and torch.equal(own, slopes[inside])
            assert torch.equal(backward(g[where].contiguous(), own, counter(), Plan(), at), gradient[inside])


@pytest.mark.parametrize("autocast", [True, False])
def test_b12_without_noise_it_is_the_operators_linear(autocast: bool) -> None:
    plain = network(Plan(noise=PseudoNoise.NONE))
    assert not any("b_i" in key for key in plain.state_dict())
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 40))
    if not autocast:  # W^ holds bfloat16's values in float32
        for layer in (linear[0], linear[2]):
            layer.weight.data = layer.weight.data.bfloat16().float()
    found = results(plain, list(plain.parameters()), autocast=autocast)
    expected = results(linear, list(linear.parameters()), autocast=autocast)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_b14_evaluation_and_state() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 40))
    model = network(Plan())
    assert set(model.state_dict()) == {*plain.state_dict(), "0.weight_fn.b_i", "2.weight_fn.b_i"}
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing) == {"0.weight_fn.b_i", "2.weight_fn.b_i"} and not unexpected
    x = torch.randn(8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        expected, noisy_y = plain(x), model(x)
        assert torch.equal(model.eval()(x), expected) and not torch.equal(noisy_y, expected)
        with high_precision(model.train()):
            assert torch.equal(model(x), expected)
    stored = network(Plan(storage=Storage.E3M2)).eval()
    weight = stored[0].weight  # type: ignore[union-attr]
    assert torch.equal(stored[0].weight_fn(weight), without_noise(weight.detach(), Plan(storage=Storage.E3M2)))  # type: ignore[union-attr, operator]


def test_b11_the_bits_decay_in_closed_form() -> None:
    """Zero gradient: b_i(T) = prod(1 - lr wd); with wd 0.1 and lr 6e-4 ten thousand steps leave b_t = 5.44."""
    method = GaussWS(pull=0.1, bit_lr=0.05)
    model = nn.Sequential(nn.Linear(64, 64))
    convert_(model, Recipe(), verbose=False)
    method.prepare_(model, 0)
    groups = method.param_groups(model, 0.1)
    (own,) = [g for g in groups if any(p is noisy(model)[0].b_i for p in g["params"])]
    assert (own["weight_decay"], own["lr"], len(own["params"])) == (0.1, 0.05, 1)
    optimizer = AdamW(groups, lr=6e-4)
    product = 1.0
    for step in range(100):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        own = next(g for g in optimizer.param_groups if g["params"][0] is noisy(model)[0].b_i)
        own["lr"] = 0.05 * (1 - step / 100)
        optimizer.step()
        product *= 1 - own["lr"] * 0.1
    assert torch.allclose(noisy(model)[0].bits(), torch.tensor(4 + 2 * product), rtol=0, atol=1e-6)
    cosine = sum(6e-4 * (0.1 + 0.9 * (1 + math.cos(math.pi * t / 10_000)) / 2) for t in range(10_000))
    assert 4 + 2 * math.exp(-0.1 * cosine) == pytest.approx(5.44, abs=0.005)


def test_the_penalty_counts_layers_or_elements() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    convert_(model, Recipe(), verbose=False)
    add_noise_(model, Plan(), seed=0)
    first, second = (weight.b_i for weight in noisy(model))
    with torch.no_grad():
        first.fill_(1.0)  # type: ignore[union-attr]  # |b - 4| = 2
        second.copy_(torch.tensor([[0.0, -0.5]]))  # type: ignore[union-attr]  # 0 and 1
    assert bit_penalty(model).item() == 2 + 0.5
    assert bit_penalty(model, by_size=True).item() == pytest.approx(2 * (4096 * 2 + 1024 * 1) / (4096 + 2048))
    bit_penalty(model).backward()
    assert first.grad.tolist() == [[0.5, 0.5], [0.5, 0.5]]  # type: ignore[union-attr]  # 2 / 4 blocks
    for regulariser, decay in ((Regulariser.DECAY, 0.3), (Regulariser.LOSS, 0.0)):
        groups = GaussWS(regulariser=regulariser, pull=0.3).param_groups(model, 0.1)
        assert decay in [g["weight_decay"] for g in groups if g["params"][0] is first]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"b_init": 1.5}, "b_init and b_target are between 2 and 25"),
        ({"b_target": math.nan}, "b_init and b_target are between 2 and 25"),
        ({"block_rows": 0}, "blocks have 1 to 1024 rows"),
        ({"block_columns": 100_000}, "blocks have 1 to 1024 rows"),
        ({"amplitude": math.inf}, "the amplitude of the noise is positive"),
        ({"bit_lr": math.nan}, "pull and bit_lr are at least 0"),
        ({"amplitude": 0.0}, "the amplitude of the noise is positive"),
        ({"pull": -1.0}, "pull and bit_lr are at least 0"),
    ],
)
def test_bad_numbers(fields: dict[str, float], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        GaussWS(**fields)  # type: ignore[arg-type]


def test_a_model_without_converted_layers() -> None:
    with pytest.raises(SpecError, match="no converted layer; call convert_"):
        add_noise_(nn.Linear(4, 4), Plan(), seed=0)


@pytest.mark.parametrize("b_i", [0.4, 20.0])
def test_the_exact_mode_is_the_whole_derivative(b_i: float) -> None:
    """Through M, within the bounds of the bits and beyond: finite differences of all weights and all bits."""
    plan = replace(EXACT, block=(4, 4), through_max=True)
    w = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    bits = torch.full((2, 2), b_i, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda w, b: _NoisyThroughMax.apply(w, b, counter(), plan.text, (0, 0), torch.float64), (w, bits), atol=1e-8
    )


def test_the_paths_of_a_model_through_its_largest_weights() -> None:
    """Every weight but the largest of each block has the same gradient with and without the path."""
    gradients = []
    for through_max in (False, True):
        model = network(Plan(through_max=through_max))
        results(model, list(model.parameters()))
        gradients.append(model[0].weight.grad)  # type: ignore[union-attr]
    assert int((gradients[0] != gradients[1]).sum()) == 3 * 2  # 96 x 64 in blocks of 32


def test_gradcheck_of_the_whole() -> None:
    """float64, no cast: W alone, since M's own path is dropped on purpose."""
    w = torch.randn(5, 6, dtype=torch.float64)
    w[0, 0] = 9.0  # the largest, held fixed below
    plan, b_i = replace(EXACT, block=(8, 8)), torch.full((1, 1), 0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda b: _Noisy.apply(w, b, counter(), plan.text, (0, 0), torch.float64), (b_i,), atol=1e-9
    )
