# SPDX-License-Identifier: Apache-2.0
"""Say how the learning rate moves; lengths are shares of the run, so a shorter run keeps the shape."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from lowbits.errors import RunError


class Curve(Enum):
    """What happens after the warm-up: a half cosine, a plateau with a linear cool-down (WSD), or nothing."""

    COSINE = "cosine"
    WSD = "wsd"
    CONSTANT = "constant"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Describe the learning rate relative to its peak: a linear warm-up, then a curve.

    Args:
        curve: what follows the warm-up: a half cosine, a plateau with a linear cool-down (wsd), or the plateau alone.
        warmup: length of the linear warm-up, as a share of all steps.
        cooldown: length of the linear cool-down of wsd, as a share of all steps.
        final: learning rate at the end, as a share of the peak.
    Raises:
        RunError: a share is outside [0, 1], or warm-up and cool-down together exceed the run.
    """

    curve: Curve = Curve.COSINE
    warmup: float = 0.05
    cooldown: float = 0.2
    final: float = 0.0

    def __post_init__(self) -> None:
        for name in ("warmup", "cooldown", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise RunError(f"{name} is a share between 0 and 1, got {getattr(self, name)}.")
        if self.curve is Curve.WSD and self.warmup + self.cooldown > 1:
            raise RunError(f"warmup {self.warmup} and cooldown {self.cooldown} exceed the run; their sum is at most 1.")

    def factor(self, step: int, steps: int) -> float:
        """Return the learning rate of an update over the peak, a pure function.

        Args:
            step: index of the update, 0 for the first.
            steps: number of updates in the run.
        """
        warm = math.ceil(self.warmup * steps)
        if step < warm:
            return (step + 1) / warm
        return self.final + (1 - self.final) * self._shape(step, steps, warm)

    def _shape(self, step: int, steps: int, warm: int) -> float:
        """What is left between final and peak: 1 at the end of the warm-up, 0 at the end of the run."""
        match self.curve:
            case Curve.COSINE:
                return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))
            case Curve.WSD:
                return min((steps - step) / max(self.cooldown * steps, 1), 1.0)
            case Curve.CONSTANT:
                return 1.0
