# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbits.errors import RunError
from lowbits.train import Curve, Schedule


@pytest.mark.parametrize("curve", list(Curve))
@given(
    steps=st.integers(1, 2000),
    warmup=st.floats(0, 0.5),
    cooldown=st.floats(0, 0.5),
    final=st.floats(0, 1),
)
def test_warm_up_rises_and_the_rest_falls(
    curve: Curve, steps: int, warmup: float, cooldown: float, final: float
) -> None:
    schedule = Schedule(curve=curve, warmup=warmup, cooldown=cooldown, final=final)
    factors = [schedule.factor(step, steps) for step in range(steps)]
    warm = math.ceil(warmup * steps)
    assert all(0 < factor <= 1 + 1e-12 for factor in factors[:warm])
    assert factors[:warm] == sorted(factors[:warm])
    assert factors[warm:] == sorted(factors[warm:], reverse=True)
    assert all(final - 1e-12 <= factor <= 1 + 1e-12 for factor in factors[warm:])


def test_points_on_the_curves() -> None:
    cosine = Schedule(warmup=0.1, final=0.1)
    assert [cosine.factor(step, 100) for step in (0, 9, 10)] == [0.1, 1.0, 1.0]
    assert cosine.factor(55, 100) == pytest.approx(0.1 + 0.9 * 0.5)
    assert cosine.factor(100, 100) == pytest.approx(0.1)
    wsd = Schedule(curve=Curve.WSD, warmup=0.1, cooldown=0.2)
    assert [wsd.factor(step, 100) for step in (50, 80, 90, 99)] == pytest.approx([1.0, 1.0, 0.5, 0.05])
    assert Schedule(curve=Curve.CONSTANT, warmup=0.0).factor(99, 100) == 1.0


@pytest.mark.parametrize(
    "options", [{"warmup": -0.1}, {"final": 1.1}, {"curve": Curve.WSD, "warmup": 0.6, "cooldown": 0.5}]
)
def test_impossible_shares(options: dict[str, object]) -> None:
    with pytest.raises(RunError):
        Schedule(**options)  # type: ignore[arg-type]
