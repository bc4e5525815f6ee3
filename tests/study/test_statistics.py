# SPDX-License-Identifier: Apache-2.0
"""The statistics against tables, hand computation and simulation."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from lowbits.study._statistics import Spread, gap_to, pooled_noise, student_quantile


# Two-sided 5 % and 1 % points as printed in any textbook.
@pytest.mark.parametrize(
    ("dof", "p", "table"),
    [
        (1, 0.975, 12.706),
        (2, 0.975, 4.303),
        (3, 0.995, 5.841),
        (4, 0.975, 2.776),
        (9, 0.995, 3.250),
        (30, 0.975, 2.042),
    ],
)
def test_student_quantiles_are_those_of_the_tables(dof: int, p: float, table: float) -> None:
    assert student_quantile(p, dof) == pytest.approx(table, abs=5e-4)


def test_gap_by_hand() -> None:
    losses = {"bf16": (3.00, 3.02, 3.04), "w8a8": (3.01, 3.03, 3.05), "w4": (3.21, 3.23, 3.25)}
    noise = pooled_noise(losses, "bf16")
    # Every arm has variance 0.02^2; 3 arms of 3 runs leave 6 degrees of freedom.
    assert noise.spread == pytest.approx(0.02) and noise.degrees_of_freedom == 6
    gap = gap_to(Spread.of(losses["w8a8"]), Spread.of(losses["bf16"]), noise)
    assert gap is not None
    error = 0.02 * math.sqrt(2 / 3)
    assert (gap.nats, gap.standard_error, gap.sigmas) == pytest.approx((0.01, error, 0.5))
    # t(0.975, 6) = 2.4469; t(1 - 0.05 / 4, 6) = 2.9687
    assert (gap.band, gap.resolvable) == pytest.approx((2.4469 * error, 2.9687 * error), rel=1e-4)
    assert (noise.band, noise.resolvable) == (gap.band, gap.resolvable)


def test_three_seeds_resolve_what_was_measured() -> None:
    """Two arms of three runs with a spread of 0.007: a gap needs 0.016 nats."""
    arm = (-0.007, 0.0, 0.007)
    noise = pooled_noise({"bf16": arm, "w8a8": arm}, "bf16")
    assert noise.band == pytest.approx(0.016, abs=5e-4)


def test_an_unstable_arm_does_not_blind_the_others() -> None:
    calm = {name: (3.0, 3.01, 3.02) for name in ("bf16", "a", "b")}
    noise = pooled_noise({**calm, "wild": (3.0, 3.5, 4.0)}, "bf16")
    assert noise.left_out == ("wild",) and noise.spread == pytest.approx(0.01)
    assert pooled_noise({"bf16": (3.0, 3.01), "wild": (3.0, 4.0)}, "bf16").left_out == ()


def test_one_seed_has_no_spread() -> None:
    noise = pooled_noise({"bf16": (3.0,), "w8a8": (3.1,)}, "bf16")
    gap = gap_to(Spread.of([3.1]), Spread.of([3.0]), noise)
    assert noise.spread is None and gap is not None
    assert gap.nats == pytest.approx(0.1) and gap.sigmas is None and gap.band is None


def test_identical_recipes_are_told_apart_as_rarely_as_promised() -> None:
    """Of 400 comparisons without any difference, 5 % are called one; within four standard errors of that."""
    draw = random.Random(0)
    seen = 0
    for _ in range(400):
        losses = {name: [draw.gauss(3, 0.01) for _ in range(3)] for name in ("bf16", "a", "b", "c")}
        noise = pooled_noise(losses, "bf16")
        gaps = [gap_to(Spread.of(losses[n]), Spread.of(losses["bf16"]), noise) for n in ("a", "b", "c")]
        seen += any(abs(g.nats) > g.resolvable for g in gaps if g and g.resolvable is not None)
    assert seen / 400 < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 400)


def test_the_null_control_s_runs_are_the_baseline_s():
    """All arms share two seeds that happen to agree; the null control alone shows how far seeds lie apart."""
    losses = {"bf16": (3.00, 3.01), "null": (3.10, 3.11), "w8a8": (3.00, 3.01)}
    noise = pooled_noise(losses, "bf16", "null")
    pooled = (statistics.variance([3.00, 3.01, 3.10, 3.11]) * 3 + statistics.variance([3.00, 3.01])) / 4
    assert noise.spread == pytest.approx(pooled**0.5)
    assert (noise.degrees_of_freedom, noise.pooled, noise.comparisons) == (4, ("bf16", "w8a8"), 2)
