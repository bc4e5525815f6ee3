# SPDX-License-Identifier: Apache-2.0
"""Read the run directories of a comparison and say what they came to: `report.json`.

Everything that `report.html` shows is here as data. The object is `Summary` with its dataclasses, field by field:

    schema        "lowbits-report-1"
    title         one line
    compared      a paragraph: what was compared, on what
    findings      [{verdict, text}], the clearest first
    noise_words   what gap can be resolved with this number of seeds
    null_words    what the null control came to; "" without one
    baseline      name of the arm that the others are measured against
    target_loss   validation loss in nats for the iso-quality columns, and target_words
    noise         {spread, degrees_of_freedom, band, resolvable, ...}          see `Noise`
    arms          [{name, recipe, role, quantizes, loss_on, gap, reach, ...}]  see `Arm` and its parts
    setup         [[label, value], ...]: model, data, budget, device
    environment   [[label, value], ...]: versions, commit, threads
    command       what to type to do it again

Losses are nats a token, memory bytes, time seconds of training alone; null stands for what is unknown or not finite.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lowbits.errors import RunError
from lowbits.study._arms import BASELINE, NULL, RECIPE, Arm, Plan, finished, measure, with_gap_curve
from lowbits.study._curves import Reach, against, reach
from lowbits.study._facts import environment, setup
from lowbits.study._numbers import listed
from lowbits.study._records import COMPARISON, Line, Record, find_runs, read_json, read_run
from lowbits.study._statistics import Noise, gap_to, pooled_noise
from lowbits.study._words import Finding, findings, noise_sentence, null_sentence, verdict

SCHEMA = "lowbits-report-1"


@dataclass(frozen=True)
class Summary:
    """What a comparison came to; the fields are those of the module's text."""

    title: str
    compared: str
    findings: tuple[Finding, ...]
    noise_words: str
    null_words: str
    baseline: str
    target_loss: float | None
    target_words: str
    noise: Noise
    arms: tuple[Arm, ...]
    setup: tuple[tuple[str, str], ...]
    environment: tuple[tuple[str, str], ...]
    command: str
    schema: str = SCHEMA

    def to_json(self) -> str:
        """Return the text of report.json."""
        return json.dumps(asdict(self), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def summarize(directory: Path) -> Summary:
    """Read a comparison, or any folder of `<recipe>/seed-<n>` runs.

    Args:
        directory: the folder that `compare` was given.
    Returns:
        The summary; runs that did not finish are in it as such.
    Raises:
        RunError: there are no runs, or a file of theirs is not readable.
    """
    plans, told = _plans(directory)
    records = {plan.name: [read_run(directory / plan.folder / f"seed-{s}", s) for s in plan.seeds] for plan in plans}
    measured = [measure(plan, records[plan.name], str(directory)) for plan in plans]
    baseline = measured[0]
    null = next((arm.name for arm in measured if arm.role == NULL), None)
    noise = pooled_noise({arm.name: arm.loss_on.values for arm in measured}, baseline.name, null)
    judged = [_judged(arm, baseline, noise) for arm in measured]
    target = _target(baseline, noise)
    arms = [_completed(arm, records, baseline, target) for arm in judged]
    every = [record for group in records.values() for record in group]
    facts = setup(told, every, arms)
    return Summary(
        title=_title(arms),
        compared=_compared(arms, dict(facts)),
        findings=tuple(findings(arms, arms[0])),
        noise_words=noise_sentence(noise),
        null_words=null_sentence(arms),
        baseline=baseline.name,
        target_loss=target,
        target_words=_target_words(baseline, target),
        noise=noise,
        arms=tuple(arms),
        setup=facts,
        environment=environment(every),
        command=str(told.get("command", "")),
    )


def _plans(directory: Path) -> tuple[list[Plan], Line]:
    """The arms, the baseline first, as comparison.json says or as the folders show; and what else it says."""
    told = read_json(directory / COMPARISON)
    if not told:
        return _found(directory), {}
    try:
        return [_plan(arm) for arm in told["arms"]], told
    except (KeyError, TypeError) as error:
        raise RunError(f"{directory / COMPARISON}: not of this version ({error}); repeat the comparison.") from error


def _plan(arm: Line) -> Plan:
    return Plan(**{**arm, "seeds": tuple(arm["seeds"]), "changes": tuple(arm.get("changes", ()))})


def _found(directory: Path) -> list[Plan]:
    """The arms as the folders show them; bf16 is the baseline, or else the first by name."""
    found: dict[str, list[int]] = {}
    for arm, seed, _ in find_runs(directory):
        found.setdefault(arm, []).append(seed)
    if not found:
        raise RunError(f"{directory}: no runs here; expected {COMPARISON} or folders <recipe>/seed-<n>.")
    names = sorted(found, key=lambda name: (name != "bf16", name))
    roles = [BASELINE] + [NULL if name == NULL else RECIPE for name in names[1:]]
    return [Plan(n, n, role, tuple(sorted(found[n]))) for n, role in zip(names, roles, strict=True)]


def _judged(arm: Arm, baseline: Arm, noise: Noise) -> Arm:
    same = arm.role == BASELINE
    gap = None if same else gap_to(arm.loss_on, baseline.loss_on, noise, unstable=arm.name in noise.left_out)
    key, words = verdict(arm, gap)
    return replace(arm, gap=gap, verdict=key, words=words)


def _target(baseline: Arm, noise: Noise) -> float | None:
    """The baseline's final loss, plus what chance alone may add: the same bar for the baseline and all others."""
    return None if baseline.loss_on.mean is None else baseline.loss_on.mean + (noise.band or 0.0)


def _target_words(baseline: Arm, target: float | None) -> str:
    final = baseline.loss_on.mean
    if final is None or target is None:
        return f"{baseline.name} has no finished run, so there is no loss to reach."
    text = f"Target: {target:.4f} nats, the final loss of {baseline.name} ({final:.4f})"
    return text + (f" plus the {target - final:.4f} that chance alone may add." if target > final else ".")


def _completed(arm: Arm, records: Mapping[str, Sequence[Record]], baseline: Arm, target: float | None) -> Arm:
    """The arm with its gap curve and with where it reaches the target."""
    runs = records[arm.name]
    reached = Reach()
    if target is not None:
        reached = against(reach(finished(runs), target), reach(finished(records[baseline.name]), target))
    return replace(arm, reach=reached, gap_curve=with_gap_curve(arm, runs, baseline))


def _title(arms: Sequence[Arm]) -> str:
    names = [arm.name for arm in arms if arm.role == RECIPE]
    if not names:
        return f"{arms[0].name} alone"
    return f"{listed(names) if len(names) < 4 else f'{len(names)} recipes'} against {arms[0].name}"


def _compared(arms: Sequence[Arm], facts: Mapping[str, str]) -> str:
    """What was compared, on what, in one paragraph."""
    seeds = sorted({len(arm.seeds) for arm in arms})
    each = "one seed each" if seeds == [1] else f"{seeds[0]} seeds each" if len(seeds) == 1 else "several seeds each"
    names = listed([arm.name for arm in arms if arm.role == RECIPE])
    what = f"{names} against {arms[0].name}" if names else arms[0].name
    labels = [label for label in ("Model", "Data", "Budget", "Device") if facts.get(label)]
    where = "; ".join(f"{label.lower()}: {facts[label]}" for label in labels)
    return f"{what}; {each}, equal data, order, initialisation and budget." + (
        f" {where[:1].upper()}{where[1:]}." if where else ""
    )
