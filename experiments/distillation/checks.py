# SPDX-License-Identifier: Apache-2.0
"""The published orderings, and what was measured. Nothing is tuned to hold; what does not is written down so."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from experiments.checks import RESULTS, Check, save, tell
from experiments.distillation.arms import Plan, Runs, Task
from lowbits.analysis import provenance


@dataclass(frozen=True)
class Ordering(Check):
    """A claim that is judged on average; `measured` is the mean, and by seed.

    Args:
        seeds: in how many seeds it holds, of how many.
    """

    seeds: str


class Comparison:
    """Advantages of one arm over another, positive where it is better, by seed."""

    def __init__(self, runs: Runs, higher_is_better: bool) -> None:
        self.runs, self.sign = runs, 1 if higher_is_better else -1

    def scores(self, arm: str) -> list[float]:
        """Of every seed."""
        return [result["score"] for result in self.runs[arm]]

    def advantage(self, arm: str, other: str) -> list[float]:
        """Of every seed."""
        return [self.sign * (a - b) for a, b in zip(self.scores(arm), self.scores(other), strict=True)]

    def better(self, id: str, arm: str, other: str, by: float = 0.0, statement: str = "") -> Ordering:
        """`arm` is better than `other` by more than `by`, on average."""
        found = self.advantage(arm, other)
        return check(
            id, statement or f"{arm} better than {other}{f' by {by:g}' if by else ''}", found, lambda x: x > by
        )


def check(id: str, statement: str, found: list[float], holds: Callable[[float], bool]) -> Ordering:
    """Judge the mean of a number, and say what it is in every seed."""
    mean = statistics.fmean(found)
    measured = f"{mean:+.4g} ({' '.join(f'{x:+.4g}' for x in found)})"
    return Ordering(id, statement, measured, holds(mean), f"{sum(map(holds, found))} of {len(found)}")


def orderings(runs: Runs, plan: Plan, higher: bool) -> list[Ordering]:
    """Sections 3.2 and 3.3: all that should reproduce on any task."""
    c = Comparison(runs, higher)
    distilled, few, many = "distilled, 32 bits", plan.bits[-1], plan.bits[0]
    qd = {bits: f"quantized distillation, {bits} bits, {plan.qd[-1]}" for bits in plan.bits}
    after = {(bits, b): f"after training, {bits} bits, {b}" for bits in plan.bits for b in ("no bucket", "256", "64")}
    same = {bits: after[bits, plan.qd[-1]] for bits in plan.bits}
    points = {bits: f"learned points, {bits} bits, 64" for bits in plan.bits}
    found = [c.better("3.3c", distilled, "labels, 32 bits")]
    for bits in plan.bits:
        found += [
            c.better("3.2", distilled, qd[bits]),
            c.better("3.2", qd[bits], same[bits]),
            c.better("3.2", after[bits, "256"], after[bits, "no bucket"]),
            c.better("3.3e", points[bits], after[bits, "64"]),
        ]
    gain = {bits: c.advantage(qd[bits], same[bits]) for bits in plan.bits}
    for more, less in zip(plan.bits, plan.bits[1:], strict=False):
        grown = [b - a for a, b in zip(gain[more], gain[less], strict=True)]
        found.append(
            check("3.3a", f"its gain over after training grows from {more} to {less} bits", grown, lambda x: x > 0)
        )
    helped = {bits: c.advantage(after[bits, "64"], after[bits, "no bucket"]) for bits in (many, few)}
    grown = [b - a for a, b in zip(helped[many], helped[few], strict=True)]
    found.append(
        check("3.3d", f"buckets of 64 help after training more at {few} bits than at {many}", grown, lambda x: x > 0)
    )
    found.append(c.better("3.3e", qd[few], points[few]))
    level = c.advantage(points[many], qd[many])
    margin = 0.5 if higher else 0.015 * statistics.fmean(c.scores(distilled))
    found.append(
        check(
            "3.2", f"{points[many]} equal or better than {qd[many]} (within {margin:.3g})", level, lambda x: x > -margin
        )
    )
    near = c.advantage(qd[many], distilled)
    found.append(check("3.3b", f"{qd[many]} within {margin:.3g} of {distilled}", near, lambda x: x > -margin))
    for bits in plan.bits:
        found.append(c.better("3.3, not promised", qd[bits], f"labels only, {bits} bits, 64"))
    return found


def thresholds(task: str, runs: Runs) -> list[Ordering]:
    """B18 to B20, with the numbers of the specification, which were read off other data of the same size."""
    c = Comparison(runs, task in ("digits", "images"))
    qd = "quantized distillation, {} bits, 64"
    after, points = "after training, {} bits, 64", "learned points, {} bits, 64"
    if task == "digits":
        found = [c.better("B18", qd.format(b), after.format(b), by) for b, by in ((4, 0.3), (3, 4.0), (2, 20.0))]
        found.append(c.better("B18", "distilled, 32 bits", "labels, 32 bits", 0.8))
        found.append(
            c.better("B19", qd.format(4), "distilled, 32 bits", -1.0, "4-bit QD at most 1 point below 32 bits")
        )
        found.append(c.better("B19", points.format(4), after.format(4), 0.3))
        return [*found, c.better("B19", qd.format(2), points.format(2))]
    if task == "text":
        return [c.better("B20", qd.format(b), after.format(b), by) for b, by in ((4, 0.005), (2, 0.3))]
    return []


def published(task: Task, runs: Runs) -> list[Ordering]:
    """The numbers that the specification wants of a GPU."""
    c = Comparison(runs, task.higher_is_better)
    qd, distilled = "quantized distillation, {} bits, " + task.plan.qd[-1], "distilled, 32 bits"
    if task.name == "text_gpu":
        near = c.advantage(qd.format(4), distilled)
        return [check("H200", "4-bit QD: perplexity at most 1.02 of the distilled", near, lambda x: x > -0.0198)]
    if task.name != "images_gpu":
        return []
    score = c.scores
    return [
        c.better("H200", distilled, "labels, 32 bits", 2.0),
        c.better("H200", qd.format(4), distilled, -1.5, "4-bit QD at most 1.5 points below 32 bits"),
        check("H200", "teacher at least 89 %", score("teacher"), lambda x: x >= 89),
        check("H200", "2 bits after training below 40 %", score("after training, 2 bits, 256"), lambda x: x < 40),
        check("H200", "2-bit QD above 75 %", score(qd.format(2)), lambda x: x > 75),
        check("H200", "4-bit QD: packed codes and ranges within 3 % of 0.53 MB",
              [r["packed_weight_bytes"] / 1e6 for r in runs[qd.format(4)]], lambda x: abs(x / 0.53 - 1) <= 0.03),
    ]  # fmt: skip


def write(task: Task, runs: Runs, device: torch.device, results: Path = RESULTS) -> Path:
    """Write benchmarks/results/<device>/distillation_<task>.json with all that was measured, and print the claims."""
    kinds = (orderings(runs, task.plan, task.higher_is_better), thresholds(task.name, runs), published(task, runs))
    found = [one for kind in kinds for one in kind]
    save_runs(task, runs, device, results, found)  # so that a run that is cut off now has everything else
    once = task.afterwards(0)
    if (added := once.get("share of a step that levels add, %")) is not None:
        found.append(check("H200", "levels add at most 15 % to a step", [added], lambda x: x <= 15))
    path = save_runs(task, runs, device, results, found, once)
    tell(path, found)
    return path


def save_runs(  # noqa: PLR0913  what the file holds
    task: Task,
    runs: Runs,
    device: torch.device,
    results: Path,
    found: Sequence[Ordering] = (),
    once: Mapping[str, float] | None = None,
) -> Path:
    """Write what there is, of a run that may be cut off."""
    content = {"unit": task.unit, "higher_is_better": task.higher_is_better, "plan": asdict(task.plan)}
    whole = {**content, "once": dict(once or {}), "runs": runs}
    return save(f"distillation_{task.name}", provenance(device), whole, found, results)
