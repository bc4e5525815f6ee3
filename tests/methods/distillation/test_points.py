# SPDX-License-Identifier: Apache-2.0
"""Learned points: assignment, gradients, order, beginnings, and how points are shared out."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lowbits.errors import ConversionError, SpecError
from lowbits.methods.differentiable_quantization import (
    Start,
    gradient_norms,
    learn_points_,
    nearest_points,
    point_parameters,
    quantile_points,
    redistribute,
    resulting_bits,
)
from lowbits.methods.distillation import Levels, coded_model, quantize_weights_, settle_
from lowbits.quantizers import PerBlock, PerGroup, PerTensor, Rounding
from tests.oracles import distillation as oracle

grid = st.integers(-64, 128).map(lambda i: i / 64)  # differences are exact, so a tie is a tie


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 6)).double()


@given(points=st.lists(grid, min_size=1, max_size=12), values=st.lists(grid, min_size=1, max_size=30))
def test_assignment_is_brute_force(points: list[float], values: list[float]) -> None:
    ordered = sorted(points)
    found = nearest_points(torch.tensor(values), torch.tensor(ordered))
    assert found.tolist() == [oracle.nearest(v, ordered) for v in values]


@given(points=st.lists(st.floats(-1, 2, width=32), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_no_point_is_nearer(points: list[float], seed: int) -> None:
    v = torch.rand(200, generator=torch.Generator().manual_seed(seed))
    p = torch.tensor(points).sort().values
    distance = (v[:, None] - p).abs()
    assert torch.equal((v - p[nearest_points(v, p)]).abs(), distance.amin(1))


def forward(points: Tensor, w: Tensor, size: int, x: Tensor) -> Tensor:
    """The whole function with the assignment as it is, built from autograd's own operations."""
    values = []
    for bucket in w.reshape(-1).split(size):
        low, high = bucket.min(), bucket.max()
        codes = [oracle.nearest(v, sorted(points.tolist())) for v in oracle.scale(bucket.tolist())]
        values.append(low + points.sort().values[codes] * (high - low))
    return (x @ torch.cat(values).view_as(w).t()).sin().sum()


@pytest.mark.parametrize("size", [16, 100, 240])
def test_gradients_of_points_are_finite_differences_and_the_oracles(size: int) -> None:
    model = net()
    layer, x = model[0], torch.randn(5, 10, dtype=torch.float64)
    w = layer.weight.detach().clone()
    layer.bias.data.zero_()
    learn_points_(layer, Levels(6, PerBlock(size)))
    (points,) = point_parameters(layer).values()
    layer(x).sin().sum().backward()
    found, p = points.grad.clone(), points.detach().clone()
    for j in range(6):
        step = torch.zeros(6, dtype=torch.float64)
        step[j] = 1e-6
        frozen = [oracle.nearest(v, p.tolist()) for b in w.reshape(-1).split(size) for v in oracle.scale(b.tolist())]
        sides = []
        for moved in (p + step, p - step):
            pieces = zip(w.reshape(-1).split(size), torch.tensor(frozen).split(size), strict=True)
            q = torch.cat([b.min() + moved[c] * (b.max() - b.min()) for b, c in pieces]).view_as(w)
            sides.append((x @ q.t()).sin().sum().item())
        assert found[j].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, abs=1e-6)
    (reference,) = torch.autograd.grad(forward(points, w, size, x), points)
    assert torch.allclose(found, reference, atol=1e-12)
    at_q = layer.weight.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad((x @ at_q.t()).sin().sum(), at_q)
    expected = oracle.point_gradients(w.reshape(-1).tolist(), g.reshape(-1).tolist(), p.tolist(), size)
    assert found.tolist() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.3, momentum=0.9), lambda p: torch.optim.Adam(p, 0.1)])
def test_the_order_of_points_is_of_no_consequence(make) -> None:
    x, y = torch.randn(40, 10, dtype=torch.float64), torch.randint(0, 6, (40,))
    models = [net(), net()]
    for model, order in zip(models, (torch.arange(5), torch.tensor([3, 0, 4, 1, 2])), strict=True):
        learn_points_(model, Levels(5, PerBlock(64)))
        for points in point_parameters(model).values():
            points.data = points.data[order]
        optimizer = make(list(point_parameters(model).values()))
        for _ in range(30):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    crossed = [p.detach() for p in point_parameters(models[0]).values()]
    assert any((p.diff() < 0).any() for p in crossed)  # points did change places, so momenta would have been mixed up
    assert torch.allclose(models[0](x), models[1](x), rtol=0, atol=1e-6)
    for coded in coded_model(models[0]).coded.values():
        assert (coded.points.diff() >= 0).all()


@given(values=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=50), count=st.integers(2, 9))
def test_quantiles(values: list[float], count: int) -> None:
    w = torch.tensor(values, dtype=torch.float64)
    scaled = sum((oracle.scale(bucket) for bucket in oracle.buckets(values, 16)), [])
    expected = [oracle.quantile(scaled, j / (count - 1)) for j in range(count)]
    assert quantile_points(w, count, PerBlock(16)).tolist() == pytest.approx(expected, abs=1e-12)


def test_a_start_in_even_steps_is_quantized_distillation() -> None:
    x, levels = torch.randn(7, 10, dtype=torch.float64), Levels(4, PerBlock(64))
    quantized, learned = net(), net()
    quantize_weights_(quantized, levels)
    learn_points_(learned, levels, start=Start.EVEN)
    assert torch.allclose(quantized(x), learned(x), atol=1e-12)
    learn_points_(quantized, levels, start=Start.EVEN)  # the warm start: a student of quantized distillation
    assert torch.equal(quantized(x), learned(x))
    assert not quantized[0].weight.is_leaf and len(point_parameters(quantized)) == 2


def test_weights_stay_and_points_move() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    learn_points_(model, Levels(4))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["0.bias", "0.weight_view.points", "2.bias", "2.weight_view.points"]
    optimizer = torch.optim.SGD(point_parameters(model).values(), 0.1)
    model(torch.randn(4, 10, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    settle_(model)
    assert set(model.state_dict()) == set(before) and not torch.equal(model[0].weight, before["0.weight"])
    assert len(model[0].weight.unique()) <= 4 * 1


@given(data=st.data())
def test_points_are_conserved_and_follow_the_norms(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.text("abcdef", min_size=1), min_size=1, max_size=8, unique=True))
    norms = {name: data.draw(st.floats(0, 100)) for name in names}
    counts = dict.fromkeys(names, data.draw(st.integers(2, 33)))
    found = redistribute(counts, norms)
    assert sum(found.values()) == sum(counts.values())
    assert all(found[name] >= counts[name] // 2 for name in names)
    ranked = sorted(names, key=norms.__getitem__)
    assert all(found[a] <= found[b] or norms[a] == norms[b] for a, b in zip(ranked, ranked[1:], strict=False))
    shuffled = random.Random(0).sample(names, len(names))
    assert redistribute({n: counts[n] for n in shuffled}, {n: norms[n] for n in shuffled}) == found


def test_redistribution_is_the_oracles() -> None:
    counts, norms = [16, 16, 8, 5], [0.3, 1.7, 2.0, 0.9]
    names = dict(zip("abcd", counts, strict=True)), dict(zip("abcd", norms, strict=True))
    assert list(redistribute(*names).values()) == oracle.redistribute(counts, norms)
    assert redistribute({"a": 16, "b": 16}, {"a": 0.0, "b": 0.0}) == {"a": 16, "b": 16}
    with pytest.raises(SpecError, match="names differ"):
        redistribute({"a": 4}, {"b": 1.0})
    with pytest.raises(SpecError, match="must be finite"):
        redistribute({"a": 4}, {"a": torch.nan})


def test_gradient_norms_are_of_the_quantized_weight_and_leave_no_trace() -> None:
    model = net()
    learn_points_(model, Levels(4))
    batches = [torch.randn(6, 10, dtype=torch.float64) for _ in range(3)]
    found = gradient_norms(model, lambda m, x: m(x).square().mean(), batches)
    reference = net()
    with torch.no_grad():
        for name in ("0", "2"):
            reference.get_submodule(name).weight.copy_(model.get_submodule(name).weight)
    torch.stack([reference(x).square().mean() for x in batches]).mean().backward()
    assert found["0.weight"] == pytest.approx(reference[0].weight.grad.norm().item(), rel=1e-12)
    assert all(p.grad is None for p in model.parameters())
    assert not model[0]._parameters["weight"].requires_grad
    counts = redistribute(dict.fromkeys(found, 4), found)
    learn_points_(model, Levels(4), counts=counts)
    assert {name: p.numel() for name, p in point_parameters(model).items()} == counts


def test_resulting_bits() -> None:
    model = net()
    learn_points_(model, Levels(4), counts={"0.weight": 6, "2.weight": 2})
    bits = resulting_bits(model)
    assert bits.nominal == 2 and bits.packed == pytest.approx((240 * 3 + 144) / 384)


def test_bad_input_is_named() -> None:
    with pytest.raises(ConversionError, match="counts: 3.weight is no weight"):
        learn_points_(net(), Levels(4), counts={"3.weight": 4})
    with pytest.raises(SpecError, match=r"0\.weight: learned points take the nearest"):
        learn_points_(net(), Levels(4, rounding=Rounding.STOCHASTIC))
    with pytest.raises(ConversionError, match="none of its 2 weights"):
        learn_points_(net(), lambda *_: None)


@pytest.mark.parametrize("buckets", [PerTensor(), PerGroup(3)])
def test_weights_may_be_trained_beside_their_points(buckets: PerTensor) -> None:
    model = net()
    learn_points_(model, Levels(4, buckets))
    model[0]._parameters["weight"].requires_grad_()
    model(torch.randn(4, 10, dtype=torch.float64)).sum().backward()
    assert model[0]._parameters["weight"].grad.abs().sum() > 0 and model[0].weight_view.points.grad is not None
