# SPDX-License-Identifier: Apache-2.0
"""Where the phases of a run begin, as marks on its curves."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from lowbits.study._curves import Curve
from lowbits.study._records import Record

PHASE = "phase"
"""The event of the log that says that one begins."""


@dataclass(frozen=True)
class Mark:
    """The beginning of a phase.

    Args:
        tokens: seen before it.
        step: optimizer steps before it.
        words: what it quantizes.
    """

    tokens: float
    step: int
    words: str


def marks(records: Sequence[Record]) -> tuple[Mark, ...]:
    """Return where the phases of an arm begin, by the run that logged the most of them.

    Args:
        records: the runs of the arm.
    """
    found = [_of_run(record) for record in records]
    return max(found, key=len, default=())


def _of_run(record: Record) -> tuple[Mark, ...]:
    a_step = next((line["tokens"] / line["step"] for line in record.steps if line.get("tokens")), 0.0)
    # The line is written after the first step of the phase.
    begun = {int(e["step"]) - 1: str(e.get("message", "")) for e in record.events if e.get("event") == PHASE}
    return tuple(Mark(a_step * step, step, words) for step, words in sorted(begun.items()))


def height(curve: Curve, tokens: float) -> float:
    """Return the value of a curve between two of its points; its ends beyond them.

    Args:
        curve: not empty.
        tokens: where.
    """
    after = bisect_left(curve.tokens, tokens)
    if after in (0, len(curve.tokens)):
        return curve.mean[0 if after == 0 else -1]
    (x0, x1), (y0, y1) = curve.tokens[after - 1 : after + 1], curve.mean[after - 1 : after + 1]
    return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)
