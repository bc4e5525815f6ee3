# SPDX-License-Identifier: Apache-2.0
"""Say in words what the numbers allow to say, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowbits.study._arms import BASELINE, NULL, Arm
from lowbits.study._numbers import listed, nats, sigmas
from lowbits.study._statistics import Gap, Noise


@dataclass(frozen=True)
class Finding:
    """One sentence of the headline.

    Args:
        verdict: of the arms that it speaks of, see `Arm`.
        text: the sentence.
    """

    verdict: str
    text: str


def verdict(arm: Arm, gap: Gap | None) -> tuple[str, str]:
    """Return the verdict on an arm as a key and as a phrase.

    Args:
        arm: with its runs.
        gap: to the baseline.
    """
    diverged = sum(run.status == "diverged" for run in arm.runs)
    if diverged:
        return "unstable", f"{diverged} of {len(arm.runs)} runs diverged"
    if arm.role == BASELINE:
        return "baseline", "the baseline"
    if gap is None:
        return "none", "nothing to compare"
    if gap.band is None or gap.resolvable is None:
        return "single", "one seed: no spread known"
    if abs(gap.nats) <= gap.band:
        return "same", "no difference seen"
    direction = "worse" if gap.nats > 0 else "better"
    if abs(gap.nats) <= gap.resolvable:
        return "suggestive", f"perhaps {direction}: more seeds would tell"
    return direction, direction


def noise_sentence(noise: Noise) -> str:
    """Return what gap the comparison can resolve, in words."""
    if noise.spread is None:
        return (
            "No recipe has two finished runs, so the run-to-run spread is unknown and no gap can be told from chance. "
            "Give --seeds 3 or more."
        )
    text = (
        f"Runs that differ in the seed alone scatter by {noise.spread:.4f} nats (standard deviation, pooled over "
        f"{len(noise.pooled)} arms, {noise.degrees_of_freedom} degrees of freedom)."
    )
    if noise.band is not None and noise.comparisons:
        text += f" With this number of seeds, a gap below {noise.band:.4f} nats cannot be told from chance"
    if noise.band is not None and noise.resolvable is not None and noise.comparisons > 1:
        text += f"; with {noise.comparisons} comparisons at once, only one above {noise.resolvable:.4f} is sure"
    if noise.band is not None and noise.comparisons:
        text += " (5 % level)."
    if noise.left_out:
        text += f" Not pooled, for their runs scatter far more widely: {listed(noise.left_out)}."
    return text


def null_sentence(arms: Sequence[Arm]) -> str:
    """Return what the null control, the baseline under other seeds, came to."""
    null = next((arm for arm in arms if arm.role == NULL), None)
    if null is None or null.gap is None:
        return ""
    text = f"Null control: the baseline under other seeds lies {nats(null.gap.nats, signed=True)} nats from itself"
    if null.verdict in ("worse", "better"):
        return text + ", more than chance should do: the spread is underestimated, trust no verdict of this size."
    if null.verdict == "same":
        return text + ": no difference seen, as it must be."
    return text + (": more than one in twenty such controls shows." if null.verdict == "suggestive" else ".")


def findings(arms: Sequence[Arm], baseline: Arm) -> list[Finding]:
    """Return the findings, the clearest first, each naming its arms."""
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        if arm.role not in (BASELINE, NULL):
            groups.setdefault(arm.verdict, []).append(arm)
    found = [Finding(key, _finding(key, groups[key], baseline)) for key in _TEXTS if key in groups]
    if baseline.verdict == "unstable":
        found.insert(0, Finding("unstable", f"The baseline {baseline.name} is unstable itself: {baseline.words}."))
    return found


def _finding(key: str, arms: Sequence[Arm], baseline: Arm) -> str:
    lead, phrase = _TEXTS[key]
    return f"{lead.format(baseline.name)}: {listed([phrase(arm) for arm in arms])}."


def _name(arm: Arm) -> str:
    return arm.name


def _with_gap(arm: Arm) -> str:
    if arm.gap is None:
        return arm.name
    in_sigmas = "" if arm.gap.sigmas is None else f" ({sigmas(arm.gap.sigmas)} sigma)"
    return f"{arm.name} by {nats(arm.gap.nats, signed=True)}{in_sigmas}"


def _diverged(arm: Arm) -> str:
    where = next(run.message for run in arm.runs if run.status == "diverged")
    return f"{arm.name} ({arm.words}; {where})"


def _with_status(arm: Arm) -> str:
    return f"{arm.name} ({arm.status})"


# Findings by verdict, the clearest first: how the sentence begins, and what it says of each arm.
_TEXTS = {
    "same": ("No difference seen from {}", _name),
    "better": ("Better than {}", _with_gap),
    "worse": ("Worse than {}", _with_gap),
    "suggestive": ("Not settled against {}, more seeds would tell", _with_gap),
    "single": ("One seed each, so no verdict against {}", _with_gap),
    "unstable": ("Diverged", _diverged),
    "none": ("No result", _with_status),
}
