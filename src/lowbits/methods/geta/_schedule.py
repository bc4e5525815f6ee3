# SPDX-License-Identifier: Apache-2.0
"""The four stages, and the constraints that the user states."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from lowbits.errors import SpecError

START_BITS = 16.0
"""Width of every quantizer at the start, as published."""
_REDUCTION = 2.0
"""b_r, bits by which the ceiling falls from one projection period to the next, as published."""
_MOST = 0.999


class Stage(enum.Enum):
    """Where a run is."""

    WARM_UP = "warm-up"
    PROJECTION = "projection"
    JOINT = "joint"
    COOL_DOWN = "cool-down"


@dataclass(frozen=True)
class Moment:
    """Place of one step within the stages.

    Args:
        stage: of the four.
        period: number of the period within the stage.
        index: number of the step within the period.
        length: steps of the period.
    """

    stage: Stage
    period: int
    index: int
    length: int


@dataclass(frozen=True)
class Target:
    """What the result must satisfy.

    Args:
        sparsity: share of the units to prune, 0 to 0.999; exactly floor(sparsity * units) are.
        lowest: b_l, fewest bits of any quantizer, at least 2.
        highest: b_u, most bits of any quantizer once projection is over, at most 16.
        floor: least share of every dimension that stays; None takes 1/3, less where a third and the sparsity do not go
            together.
    Raises:
        SpecError: a value is out of range, or the range of bits is upside down.
    """

    sparsity: float
    lowest: float = 4.0
    highest: float = 8.0
    floor: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= _MOST:
            raise SpecError(
                f"Target: sparsity is a share from 0 to {_MOST}, got {self.sparsity}; 0.5 prunes half the units."
            )
        if not 2 <= self.lowest <= START_BITS or not 2 <= self.highest <= START_BITS:
            raise SpecError(
                f"Target: bits are between 2 and {START_BITS:g}, got lowest={self.lowest:g}, highest={self.highest:g}."
            )
        if self.lowest > self.highest:
            raise SpecError(
                f"Target: the range of bits is upside down, lowest={self.lowest:g} > highest={self.highest:g}; swap "
                "them."
            )
        if math.ceil(self.lowest) > math.floor(self.highest):
            raise SpecError(
                f"Target: no whole number of bits lies between {self.lowest:g} and {self.highest:g}; widen the range."
            )
        if self.floor is not None and not 0 <= self.floor < 1:
            raise SpecError(f"Target: floor is a share from 0 to below 1, got {self.floor}.")

    def pruned(self, units: int) -> int:
        """Return K, how many units go."""
        return math.floor(self.sparsity * units)

    def stays(self, size: int) -> int:
        """Return how many units of a dimension stay at least: one, or the floor's share."""
        share = min(1 / 3, 2 / 3 * (1 - self.sparsity)) if self.floor is None else self.floor
        return max(1, math.ceil(share * size - 1e-9))

    def ceilings(self) -> tuple[float, ...]:
        """Return the most bits that each projection period allows, the last of them b_u."""
        periods = math.ceil((START_BITS - self.highest) / _REDUCTION) + 1
        return tuple(max(START_BITS - _REDUCTION * period, self.highest) for period in range(periods))


@dataclass(frozen=True)
class Schedule:
    """Steps of the four stages; after the last the cool-down goes on.

    Args:
        warm_up: K_w.
        projection: steps of all projection periods.
        joint: steps of all pruning periods.
        cool_down: K_c.
        periods: P, how often units are chosen.
    """

    warm_up: int
    projection: int
    joint: int
    cool_down: int
    periods: int = 5

    @classmethod
    def of(cls, steps: int, periods: int | None = None) -> Schedule:
        """Return a tenth of warm-up, two tenths of projection, three of joint training and four of cool-down.

        Args:
            steps: of the whole run, 10 at least.
            periods: P; at most 10 and five steps each if None.
        """
        if steps < 10:
            raise SpecError(
                f"Schedule: {steps} steps are too few for four stages; train for 10 at least, better for 1,000."
            )
        warm_up, projection, joint = steps // 10, steps // 5, 3 * steps // 10
        periods = max(1, min(10, joint // 5)) if periods is None else periods
        return cls(warm_up, projection, joint, steps - warm_up - projection - joint, periods)

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return self.warm_up + self.projection + self.joint + self.cool_down

    def check(self, target: Target) -> None:
        """Raise SpecError if the target cannot be reached with these steps."""
        lengths = {name: getattr(self, name) for name in ("warm_up", "projection", "joint", "cool_down")}
        for name, length in lengths.items():
            if length < 0:
                raise SpecError(f"Schedule: {name} has {length} steps; it must be 0 or more.")
        ceilings = len(target.ceilings())
        if self.projection < ceilings:
            raise SpecError(
                f"Schedule: projection has {self.projection} steps, but from {START_BITS:g} to {target.highest:g} bits "
                f"the ceiling falls in {ceilings} periods of a step or more; give it {ceilings} steps at least."
            )
        if target.sparsity and not 1 <= self.periods <= self.joint:
            raise SpecError(
                f"Schedule: {self.periods} pruning periods in {self.joint} steps of joint training; there must be one "
                "at least, and a step for each."
            )
        if self.cool_down < 1:
            raise SpecError("Schedule: cool_down has 0 steps; it makes the bits whole, give it one step at least.")

    def at(self, step: int, target: Target) -> Moment:
        """Return the place of a step, 0 for the first."""
        if step < self.warm_up:
            return Moment(Stage.WARM_UP, 0, step, self.warm_up)
        step -= self.warm_up
        if step < self.projection:
            return _within(Stage.PROJECTION, step, self.projection, len(target.ceilings()))
        step -= self.projection
        if step < self.joint:
            return _within(Stage.JOINT, step, self.joint, self.periods)
        return Moment(Stage.COOL_DOWN, 0, step - self.joint, self.cool_down)


def _within(stage: Stage, step: int, total: int, periods: int) -> Moment:
    """Divide a stage into equal periods; the last takes what is over."""
    length = max(total // max(periods, 1), 1)
    period = min(step // length, max(periods, 1) - 1)
    last = period == max(periods, 1) - 1
    return Moment(stage, period, step - period * length, total - period * length if last else length)
