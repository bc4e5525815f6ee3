# SPDX-License-Identifier: Apache-2.0
"""Sharpness of functions whose maximum in a ball is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lowbits.analysis import dequantized, m_sharpness
from lowbits.errors import SpecError
from lowbits.formats import INT4
from lowbits.nn import Gemm, Recipe, convert_
from lowbits.quantizers import PerRow, QuantSpec


class Quadratic(nn.Module):
    """L(theta) = (theta - b)^T A (theta - b) / 2 of two tensors that together are theta."""

    def __init__(self, curvature: Tensor) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(1, 1))
        self.curvature = curvature

    def theta(self) -> Tensor:
        return torch.cat([self.first, self.second.flatten()])


def quadratic(model: Quadratic, b: Tensor) -> Tensor:
    offset = model.theta() - b
    return offset @ model.curvature @ offset / 2


@pytest.fixture
def model() -> Quadratic:
    return Quadratic(torch.diag(torch.tensor([1.0, 3.0, 10.0])))


def test_one_step_has_a_closed_form(model: Quadratic) -> None:
    batches = [torch.zeros(3), torch.tensor([1.0, -1.0, 0.5])]
    theta, a = model.theta().detach().double(), model.curvature.double()
    found = m_sharpness(model, quadratic, batches, rho=0.1)
    radius = 0.1 * theta.norm().item()
    rises = []
    for b in batches:
        g = a @ (theta - b.double())
        rises.append((radius * g.norm() + radius**2 / 2 * (g @ a @ g) / g.norm() ** 2).item())
    assert found.per_batch == pytest.approx(rises, rel=1e-4)
    assert found.value == pytest.approx(sum(rises) / 2, rel=1e-4)
    assert found.standard_error == pytest.approx(abs(rises[0] - rises[1]) / 2, rel=1e-3)
    assert found.radius == pytest.approx(radius, rel=1e-6)


def test_more_steps_come_close_to_the_maximum_and_stay_in_the_ball(model: Quadratic) -> None:
    theta = model.theta().detach()
    directions = nn.functional.normalize(torch.randn(200_000, 3), dim=1) * 0.3 * theta.norm()
    offsets = theta + directions
    best = ((offsets @ model.curvature * offsets).sum(1) / 2 - quadratic(model, torch.zeros(3))).max().item()
    one, five, twenty = (m_sharpness(model, quadratic, [torch.zeros(3)], rho=0.3, steps=k).value for k in (1, 5, 20))
    assert one <= five * (1 + 1e-6) and five <= twenty * (1 + 1e-3)
    assert twenty <= best * (1 + 1e-4)  # the sampled best is itself a little below the true one
    assert twenty == pytest.approx(best, rel=1e-3)


def test_the_model_is_left_as_it_was(model: Quadratic) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    m_sharpness(model, quadratic, [torch.zeros(3)], steps=3)
    assert model.training and all(torch.equal(before[n], v) for n, v in model.state_dict().items())

    def broken(model: Quadratic, b: Tensor) -> Tensor:
        value = quadratic(model, b)
        if not torch.is_grad_enabled():
            raise RuntimeError("the last evaluation fails")
        return value

    with pytest.raises(RuntimeError, match="the last"):
        m_sharpness(model, broken, [torch.zeros(3)])
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


def test_a_flat_point_and_bad_arguments(model: Quadratic) -> None:
    assert m_sharpness(model, quadratic, [model.theta().detach()]).value == 0.0
    assert math.isnan(m_sharpness(model, quadratic, [torch.zeros(3)]).standard_error)
    for arguments in ({"rho": 0.0}, {"steps": 0}):
        with pytest.raises(SpecError, match="rho > 0"):
            m_sharpness(model, quadratic, [torch.zeros(3)], **arguments)
    with pytest.raises(SpecError, match="0 batches"):
        m_sharpness(model, quadratic, [])


def test_dequantized_is_the_quantized_model_in_ordinary_arithmetic() -> None:
    linear = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))
    origin = [p.detach().clone() for p in linear.parameters()]
    recipe = Recipe(fprop=Gemm(None, QuantSpec(INT4, PerRow())))
    convert_(linear, lambda name, module: recipe if name == "0" else Recipe(), verbose=False)
    x = torch.randn(5, 16)
    quantizers_on, plain = linear(x), nn.functional.linear(x, linear[0].weight, linear[0].bias)
    with dequantized(linear) as same:
        torch.testing.assert_close(same(x), quantizers_on)
        assert not torch.allclose(same[0](x), plain)
        assert same[0].recipe.plain
        assert len(same[0].weight[0].unique()) <= 15
        torch.testing.assert_close(same[2].weight.detach(), origin[2], rtol=0, atol=0)
    assert linear[0].recipe == recipe
    assert all(torch.equal(a, b) for a, b in zip(origin, linear.parameters(), strict=True))
