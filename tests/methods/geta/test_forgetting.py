# SPDX-License-Identifier: Apache-2.0
"""The rule that couples forgetting and step size: against the oracle, and against the inequality that it promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbits.methods.geta import _forgetting as forgetting
from lowbits.methods.geta._forgetting import Pairs, Products
from tests.oracles import geta as oracle

REAL = st.floats(-2, 2).map(lambda v: v if abs(v) > 1e-3 else 1e-3)
LAYERS = st.lists(st.tuples(REAL, st.floats(1e-3, 1e-1), st.floats(1.0, 64.0)), min_size=1, max_size=4)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(st.floats(1e-3, 2), REAL, LAYERS, st.integers(1, 9))
def test_one_dimension_is_the_oracles(
    a: float, beta: float, layers: list[tuple[float, float, float]], left: int
) -> None:
    e, finest, ratio = zip(*layers, strict=True)
    coarsest = [low * r for low, r in zip(finest, ratio, strict=True)]
    gamma, steps = oracle.rule(a, beta, 1.0, e, finest, coarsest, 1 / left)
    pairs = Pairs(torch.zeros(len(e), dtype=torch.int64), torch.arange(len(e)))
    found = forgetting.rates(
        Products(double(a), double(beta), double(1.0), double(*e)), pairs, double(*finest), double(*coarsest), 1 / left
    )
    assert float(found.forgetting) == pytest.approx(gamma, rel=1e-9)
    assert found.step.tolist() == pytest.approx(steps, rel=1e-9)


@given(st.integers(0, 10_000))
def test_shared_layers_keep_descent_and_their_own_range(seed: int) -> None:
    """A10 and A12: several dimensions, layers that several of them share, ranges that differ by a factor of 16."""
    noise = torch.Generator().manual_seed(seed)
    dims, layers, number = 4, 3, 9
    e = torch.randn(number, generator=noise, dtype=torch.float64)
    beta = torch.randn(dims, generator=noise, dtype=torch.float64)
    a = torch.rand(dims, generator=noise, dtype=torch.float64) + 1e-3
    pairs = Pairs(
        torch.randint(0, dims, (number,), generator=noise), torch.randint(0, layers, (number,), generator=noise)
    )
    finest = double(0.001, 0.016, 0.256)
    found = forgetting.rates(Products(a, beta, torch.ones_like(a), e), pairs, finest, finest * 18, 0.25)
    assert (found.slope < 0).all()
    assert ((found.forgetting >= 0) & (found.forgetting <= 0.25)).all()
    chosen = ~found.step.isnan()
    assert chosen.tolist() == [bool((pairs.layer == layer).any()) for layer in range(layers)]
    assert ((found.step >= finest) & (found.step <= finest * 18))[chosen].all()


def test_uniform_forgetting_leaves_nothing_after_the_last_step() -> None:
    """A11."""
    left = math.prod(1 - forgetting.uniform_rate(k, 7) for k in range(7))
    assert left == 0 and forgetting.uniform_rate(0, 1) == 1
    assert [forgetting.uniform_rate(k, 4) for k in range(4)] == pytest.approx([1 / 4, 1 / 3, 1 / 2, 1])


def test_what_is_not_finite_or_is_gone_is_not_forgotten() -> None:
    pairs = Pairs(torch.tensor([0, 1, 2]), torch.tensor([0, 0, 0]))
    found = forgetting.rates(
        Products(double(math.nan, 1, 1), double(1, math.inf, 1), double(1, 1, 0), double(-1, -1, -1)),
        pairs, double(0.1), double(1.0), 0.5,
    )  # fmt: skip
    assert found.forgetting.tolist() == [0, 0, 0] and found.step.tolist() == [1.0]


def test_a_climbing_optimizer_gets_the_finest_step() -> None:
    pairs = Pairs(torch.tensor([0]), torch.tensor([0]))
    found = forgetting.rates(
        Products(double(-1), double(1), double(1), double(-1)), pairs, double(0.1), double(1.0), 0.5
    )
    assert found.step.tolist() == [0.1] and found.forgetting.tolist() == [0.5]
