# SPDX-License-Identifier: Apache-2.0
"""Curves over training: the seeds of an arm as one line with a band, and where that line reaches a given loss."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lowbits.study._records import Line, Record, finite

MAX_POINTS = 300
# The moving average of the training loss spans this share of the run.
SMOOTHING = 0.04


@dataclass(frozen=True)
class Curve:
    """A quantity over training, over the seeds of an arm.

    Args:
        step: optimizer steps.
        tokens: tokens seen until then.
        mean: mean over the seeds that have this step.
        low: the smallest of them.
        high: the largest of them.
    """

    step: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    mean: tuple[float, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


@dataclass(frozen=True)
class Reach:
    """Where an arm reaches the target loss: a faster step that needs more tokens is no gain.

    Args:
        tokens: tokens until the mean validation curve first meets the target, interpolated; None if it never does.
        seconds: training seconds until then.
        tokens_ratio: those tokens relative to the baseline's.
        seconds_ratio: those seconds relative to the baseline's.
        short_by: how far above the target the arm ends, in nats, where it never meets it.
    """

    tokens: float | None = None
    seconds: float | None = None
    tokens_ratio: float | None = None
    seconds_ratio: float | None = None
    short_by: float | None = None


@dataclass(frozen=True)
class _Point:
    tokens: float
    seconds: float
    values: list[float] = field(default_factory=list)


def mean_curve(runs: Sequence[Mapping[int, tuple[int, float]]]) -> Curve:
    """Return mean and range over runs.

    Args:
        runs: for each run, step -> (tokens, value).
    """
    points: dict[int, tuple[int, list[float]]] = {}
    for run in runs:
        for step, (tokens, value) in run.items():
            points.setdefault(step, (tokens, []))[1].append(value)
    kept = _thinned(sorted(points))
    groups = [points[step][1] for step in kept]
    return Curve(
        step=tuple(kept),
        tokens=tuple(points[step][0] for step in kept),
        mean=tuple(statistics.fmean(group) for group in groups),
        low=tuple(min(group) for group in groups),
        high=tuple(max(group) for group in groups),
    )


def _thinned(steps: list[int]) -> list[int]:
    """At most MAX_POINTS of them, evenly, the last always."""
    stride = -(-len(steps) // MAX_POINTS) or 1
    return sorted({*steps[::stride], *steps[-1:]})


def series(lines: Sequence[Line], key: str) -> dict[int, tuple[int, float]]:
    """Return step -> (tokens, value) of the lines in which `key` is a finite number."""
    return {
        int(line["step"]): (int(line.get("tokens", 0)), value)
        for line in lines
        if (value := finite(line.get(key))) is not None
    }


def smoothed(points: Mapping[int, tuple[int, float]]) -> dict[int, tuple[int, float]]:
    """Return the exponential moving average, corrected for its start, over SMOOTHING of the run."""
    keep = 1 - 2 / (max(1.0, SMOOTHING * len(points)) + 1)
    total = weight = 0.0
    averaged = {}
    for step, (tokens, value) in points.items():
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        averaged[step] = (tokens, total / weight)
    return averaged


def difference(arm: Sequence[Record], baseline: Curve) -> Curve:
    """Return validation loss minus the mean of the baseline, at the steps that both have."""
    reference = dict(zip(baseline.step, baseline.mean, strict=True))
    runs = [
        {step: (tokens, value - reference[step]) for step, (tokens, value) in run.items() if step in reference}
        for run in (series(record.evaluations, "loss_on") for record in arm)
    ]
    return mean_curve(runs)


def reach(runs: Sequence[Record], target: float) -> Reach:
    """Return where the mean validation loss of the runs (quantizers on) first meets a target.

    Args:
        runs: the finished runs of one arm.
        target: loss in nats.
    """
    curve = _common_points(runs)
    before: tuple[float, _Point] | None = None
    loss = None
    for point in curve:
        loss = statistics.fmean(point.values)
        if loss <= target + 1e-9:
            share = 1.0 if before is None else (before[0] - target) / (before[0] - loss)
            start = point if before is None else before[1]
            return Reach(
                tokens=start.tokens + share * (point.tokens - start.tokens),
                seconds=start.seconds + share * (point.seconds - start.seconds),
            )
        before = loss, point
    return Reach(short_by=None if loss is None else loss - target)


def _common_points(runs: Sequence[Record]) -> list[_Point]:
    """Evaluations at the steps that every run has, in order."""
    by_run = [
        {int(line["step"]): line for line in run.evaluations if finite(line.get("loss_on")) is not None} for run in runs
    ]
    common = sorted(set.intersection(*(set(run) for run in by_run))) if by_run else []
    return [
        _Point(
            tokens=statistics.fmean(float(run[step]["tokens"]) for run in by_run),
            seconds=statistics.fmean(float(run[step]["seconds"]) for run in by_run),
            values=[float(run[step]["loss_on"]) for run in by_run],
        )
        for step in common
    ]


def against(arm: Reach, baseline: Reach) -> Reach:
    """Return the arm's reach with its ratios to the baseline's."""
    return Reach(
        tokens=arm.tokens,
        seconds=arm.seconds,
        tokens_ratio=_ratio(arm.tokens, baseline.tokens),
        seconds_ratio=_ratio(arm.seconds, baseline.seconds),
        short_by=arm.short_by,
    )


def _ratio(value: float | None, reference: float | None) -> float | None:
    return value / reference if value is not None and reference else None
