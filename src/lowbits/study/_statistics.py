# SPDX-License-Identifier: Apache-2.0
"""Tell a difference between recipes from chance.

Runs of one recipe under other seeds scatter; a gap counts only against that scatter. With two or three seeds an arm,
no arm knows its own spread, so all arms share one (they differ in the recipe alone):

    s^2      = sum_a sum_i (x_ai - mean_a)^2 / sum_a (n_a - 1)            pooled spread
    gap_a    = mean_a - mean_baseline
    SE_a     = s sqrt(1 / n_a + 1 / n_baseline)
    band_a   = t(1 - 0.05 / 2, dof) SE_a                                  one comparison
    resolvable_a = t(1 - 0.05 / (2 m), dof) SE_a                          m comparisons at once (Bonferroni)

Runs are not paired by seed: a change of 1e-6 in the initial weights moves the final loss as far as another seed does,
so pairing would promise a precision that is not there.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

LEVEL = 0.05
# An arm that scatters four times as widely as the others together (p of about 0.01) is unstable, not noisy: it would
# blind the comparison of all others. It is judged by its own spread. Below 4 degrees of freedom nobody can tell.
UNSTABLE_SPREAD = 4.0
UNSTABLE_MIN_DOF = 4


@dataclass(frozen=True)
class Spread:
    """A quantity over the seeds of one arm.

    Args:
        values: one a run, in the order of the seeds.
        mean: their mean; None without values.
        spread: their standard deviation (n - 1); None with fewer than two values.
    """

    values: tuple[float, ...]
    mean: float | None
    spread: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the mean and the standard deviation of `values`.

        >>> Spread.of([1.0, 3.0]).spread == 2**0.5
        True
        """
        mean = statistics.fmean(values) if values else None
        return cls(tuple(values), mean, statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Noise:
    """How far runs scatter by their seed alone.

    Args:
        spread: pooled standard deviation in nats; None if no arm has two runs.
        degrees_of_freedom: sum over the pooled arms of (runs - 1).
        pooled: the arms that it was taken from.
        left_out: unstable arms, judged by their own spread.
        comparisons: how many arms are compared with the baseline.
        band: the smallest gap that one comparison can tell from chance at the 5 % level, in nats, for an arm with as
            many runs as the baseline; None where no spread is known.
        resolvable: the same when all comparisons are made at once.
    """

    spread: float | None
    degrees_of_freedom: int
    pooled: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    comparisons: int = 0
    band: float | None = None
    resolvable: float | None = None


@dataclass(frozen=True)
class Gap:
    """An arm's distance from the baseline.

    Args:
        nats: mean of the arm minus mean of the baseline.
        standard_error: of that difference, in nats; None where no spread is known.
        sigmas: the gap divided by the pooled seed spread; None where it is unknown or zero.
        band: the smallest gap that one comparison alone can tell from chance at the 5 % level, in nats.
        resolvable: the same when all comparisons of the table are made at once, in nats.
    """

    nats: float
    standard_error: float | None = None
    sigmas: float | None = None
    band: float | None = None
    resolvable: float | None = None


def student_quantile(p: float, dof: int) -> float:
    """Return the quantile of Student's t distribution with an integer number of degrees of freedom.

    The closed sums of Abramowitz and Stegun 26.7.3 and 26.7.4, inverted by bisection.

    Args:
        p: probability, 0.5 <= p < 1.
        dof: degrees of freedom, >= 1.
    Returns:
        t such that P(T <= t) = p.

    >>> round(student_quantile(0.975, 4), 3)
    2.776
    """
    low, high = 0.0, 1.0
    while _central_probability(high, dof) < 2 * p - 1:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _central_probability(middle, dof) < 2 * p - 1 else (low, middle)
    return (low + high) / 2


def _central_probability(t: float, dof: int) -> float:
    """P(|T| <= t)."""
    theta = math.atan(t / math.sqrt(dof))
    odd = dof % 2
    term = total = (math.cos(theta) if dof > 1 else 0.0) if odd else 1.0
    for k in range(2 + odd, dof - 1, 2):
        term *= math.cos(theta) ** 2 * (k - 1) / k
        total += term
    return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total


def pooled_noise(losses: Mapping[str, Sequence[float]], baseline: str, null: str | None = None) -> Noise:
    """Pool the seed spread of all arms, unstable ones aside, and say what gap it leaves visible.

    Args:
        losses: final validation losses of the finished runs of each arm, in nats.
        baseline: the arm that the others are compared with; it is never left out.
        null: the arm that is the baseline under other seeds. Its runs and the baseline's are one population: all other
            arms share the baseline's seeds, so only this one shows how far seeds can lie apart.
    """
    told = dict(losses)
    if null is not None:
        told[baseline] = [*told[baseline], *told.pop(null)]
    pool = {name: values for name, values in told.items() if len(values) > 1}
    left_out: list[str] = []
    while candidates := [name for name in pool if name != baseline]:
        widest = max(candidates, key=lambda name: statistics.stdev(pool[name]))
        rest = _pooled({name: values for name, values in pool.items() if name != widest})
        if rest.degrees_of_freedom < UNSTABLE_MIN_DOF or rest.spread is None:
            break
        if statistics.stdev(pool[widest]) <= UNSTABLE_SPREAD * rest.spread:
            break
        left_out.append(widest)
        del pool[widest]
    comparisons = sum(bool(values) for name, values in losses.items() if name != baseline)
    noise = replace(_pooled(pool), left_out=tuple(left_out), comparisons=comparisons)
    reference = Spread.of(losses[baseline])
    even = gap_to(reference, reference, noise)
    return noise if even is None else replace(noise, band=even.band, resolvable=even.resolvable)


def _pooled(arms: Mapping[str, Sequence[float]]) -> Noise:
    dof = sum(len(values) - 1 for values in arms.values())
    squares = sum(statistics.variance(values) * (len(values) - 1) for values in arms.values())
    return Noise(math.sqrt(squares / dof) if dof else None, dof, tuple(arms))


def gap_to(arm: Spread, baseline: Spread, noise: Noise, unstable: bool = False) -> Gap | None:
    """Return the gap between an arm and the baseline, and what could have been seen.

    Args:
        arm: final validation losses of the arm.
        baseline: those of the baseline.
        noise: the pooled seed spread.
        unstable: the arm was left out of the pool; its own spread is used (Welch).
    Returns:
        None when either has no finished run.
    """
    if arm.mean is None or baseline.mean is None:
        return None
    nats = arm.mean - baseline.mean
    if noise.spread is None:
        return Gap(nats)
    own = arm.spread if unstable and arm.spread is not None else noise.spread
    parts = own**2 / len(arm.values), noise.spread**2 / len(baseline.values)
    dof = _welch_dof(parts, (len(arm.values) - 1, noise.degrees_of_freedom)) if unstable else noise.degrees_of_freedom
    error = math.sqrt(sum(parts))
    return Gap(
        nats=nats,
        standard_error=error,
        sigmas=nats / noise.spread if noise.spread else None,
        band=student_quantile(1 - LEVEL / 2, dof) * error,
        resolvable=student_quantile(1 - LEVEL / (2 * max(noise.comparisons, 1)), dof) * error,
    )


def _welch_dof(parts: tuple[float, float], dofs: tuple[int, int]) -> int:
    """Welch and Satterthwaite's degrees of freedom of a sum of two variances, rounded down."""
    weight = sum(part**2 / dof for part, dof in zip(parts, dofs, strict=True))
    return max(1, math.floor(sum(parts) ** 2 / weight)) if weight else 1
