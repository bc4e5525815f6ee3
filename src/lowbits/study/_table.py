# SPDX-License-Identifier: Apache-2.0
"""Print a summary in the terminal: findings, one table, two samples."""

from __future__ import annotations

from itertools import islice

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowbits.study._arms import NULL, Arm
from lowbits.study._numbers import UNKNOWN, count, listed, nats, ratio, sigmas, with_spread
from lowbits.study._summary import Summary

_STYLES = {"same": "green", "better": "blue", "worse": "dark_orange3", "suggestive": "yellow", "unstable": "red"}
_NUM_SAMPLES = 2
_SAMPLE_LINES = 12


def print_summary(summary: Summary, console: Console) -> None:
    """Print what the report says, as far as a terminal can show it.

    Args:
        summary: of a comparison.
        console: where to.
    """
    console.print(_table(summary))
    for finding in summary.findings:
        console.print(Text(finding.text, style=_STYLES.get(finding.verdict, "")))
    for words in (summary.noise_words, summary.null_words):
        console.print(Text(words, style="dim"), end="\n" if words else "")
    samples = ((arm.name, arm.sample) for arm in summary.arms if arm.sample and arm.role != NULL)
    for name, sample in islice(samples, _NUM_SAMPLES):
        console.print(Text(f"\n{name} writes:", style="bold"))
        console.print(Text("\n".join(f"  {line}" for line in sample.splitlines()[:_SAMPLE_LINES])))


def _table(summary: Summary) -> Table:
    table = Table("recipe", "verdict", box=SIMPLE_HEAD, title=summary.title, title_justify="left")
    for heading in (
        "val. loss",
        "off",
        "perplexity",
        "gap",
        "sigmas",
        "tokens to target",
        "tokens/s",
        "in few bits",
    ):
        table.add_column(heading, justify="right")
    for arm in summary.arms:
        table.add_row(*_row(arm))
    arms: dict[str, list[str]] = {}
    for arm in summary.arms:
        if arm.execution not in ("", "high precision"):
            arms.setdefault(arm.execution, []).append(arm.name)
    kinds = [f"{kind} for {listed(names)}" for kind, names in arms.items()]
    speed = f"Few-bit arithmetic is {', '.join(kinds)}. " if kinds else ""
    table.caption = f"{speed}In few bits: memory as it would be stored, of what was measured. {summary.target_words}"
    table.caption_justify = "left"
    return table


def _row(arm: Arm) -> tuple[str | Text, ...]:
    measured, stored = sum(arm.memory_measured.values()), sum(arm.memory_stored.values())
    trouble = "" if all(run.status in ("finished", "diverged") for run in arm.runs) else f" ({arm.status})"
    return (
        arm.name,
        Text(f"{arm.words}{trouble}", style=_STYLES.get(arm.verdict, "")),
        with_spread(arm.loss_on),
        nats(arm.loss_off.mean),
        with_spread(arm.perplexity, digits=1),
        nats(arm.gap.nats if arm.gap else None, signed=True),
        sigmas(arm.gap.sigmas if arm.gap else None),
        "not reached" if arm.reach.short_by is not None else ratio(arm.reach.tokens_ratio),
        count(arm.tokens_per_second.mean),
        f"{100 * stored / measured:.0f} %" if measured else UNKNOWN,
    )
