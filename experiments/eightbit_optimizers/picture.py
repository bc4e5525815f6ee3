# SPDX-License-Identifier: Apache-2.0
"""Draw the largest models as an SVG: a row a budget, a dot a setup, parameters on a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

WIDTH, PANEL, LEFT, TOP, ROW, BOTTOM = 860, 340, 74, 104, 46, 46
LOW, HIGH = 0.15e9, 60e9
TICKS = (0.2e9, 0.5e9, 1e9, 2e9, 5e9, 10e9, 20e9, 50e9)
COLOURS = ("#6b7280", "#93c5fd", "#3b82f6", "#fdba74", "#ea580c")
TITLE = "Parameters of the largest model that trains: 1024 tokens, activation checkpointing"
INK, FAINT, PAPER = "#1f2937", "#e5e7eb", "#ffffff"


def text(x: float, y: float, words: str, anchor: str = "middle", size: int = 12, weight: int = 400) -> str:
    style = f'text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" fill="{INK}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'


def position(parameters: float) -> float:
    """Return where a number of parameters lies in a panel."""
    return PANEL * math.log(parameters / LOW) / math.log(HIGH / LOW)


def short(parameters: float) -> str:
    """Return a number of parameters in billions."""
    digits = 2 if parameters < 0.995e9 else 1 if parameters < 9.95e9 else 0
    return f"{parameters / 1e9:.{digits}f} B"


def legend(setups: Sequence[str]) -> Iterator[str]:
    x = 20.0
    for colour, setup in zip(COLOURS, setups, strict=True):
        yield f'<circle cx="{x:.1f}" cy="52" r="6" fill="{colour}"/>' + text(x + 11, 56, setup, "start")
        x += 34 + 6.6 * len(setup)


def panel(left: float, family: str, rows: Sequence[dict[str, Any]], setups: Sequence[str]) -> Iterator[str]:
    budgets = sorted({row["gib"] for row in rows})
    end = TOP + ROW * len(budgets)
    yield text(left + PANEL / 2, TOP - 14, family, size=14, weight=600)
    for tick in TICKS:
        x = left + position(tick)
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{end}" stroke="{FAINT}"/>'
        yield text(x, end + 18, f"{tick / 1e9:g} B")
    for number, budget in enumerate(budgets):
        y = TOP + ROW * (number + 0.5)
        found = {row["setup"]: row["parameters"] for row in rows if row["gib"] == budget and "parameters" in row}
        xs = [left + position(count) for count in found.values()]
        yield f'<line x1="{min(xs):.1f}" x2="{max(xs):.1f}" y1="{y}" y2="{y}" stroke="{FAINT}" stroke-width="4"/>'
        for colour, setup in zip(COLOURS, setups, strict=True):
            if setup in found:
                tip = f"<title>{escape(f'{family}, {budget} GiB, {setup}: {short(found[setup])}')}</title>"
                x = left + position(found[setup])
                yield f'<circle cx="{x:.1f}" cy="{y}" r="6.5" fill="{colour}" stroke="{PAPER}">{tip}</circle>'
        yield text(min(xs) - 11, y + 4, short(min(found.values())), "end", 11)
        yield text(max(xs) + 11, y + 4, short(max(found.values())), "start", 11)


def draw(rows: Sequence[dict[str, Any]], setups: Sequence[str]) -> str:
    """Return the picture.

    Args:
        rows: `family`, `gib`, `setup`, `parameters` (absent where nothing fits).
        setups: in the order of the legend.
    """
    families = list(dict.fromkeys(row["family"] for row in rows))
    budgets = sorted({row["gib"] for row in rows})
    height = TOP + ROW * len(budgets) + BOTTOM
    parts: list[str | Iterable[str]] = [
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="{PAPER}"/>',
        text(
            20,
            28,
            "Parameters of the largest model that trains: 1024 tokens, activation checkpointing",
            "start",
            15,
            600,
        ),
        legend(setups),
        [text(LEFT - 10, TOP + ROW * (i + 0.5) + 4, f"{b} GiB", "end", 12, 600) for i, b in enumerate(budgets)],
    ]
    for number, family in enumerate(families):
        left = LEFT + number * (PANEL + 50)
        parts.append(panel(left, family, [row for row in rows if row["family"] == family], setups))
    body = "\n".join(part if isinstance(part, str) else "\n".join(part) for part in parts)
    font = 'font-family="system-ui, -apple-system, Segoe UI, Roboto, sans-serif"'
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font} role="img">\n{body}\n</svg>\n'
