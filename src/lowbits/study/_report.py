# SPDX-License-Identifier: Apache-2.0
"""Write `report.html`: one file that needs nothing else, neither network nor server."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from lowbits.study import _numbers
from lowbits.study._figures import colors, error_histories, figures, memory_legend, roles
from lowbits.study._layer_errors import ROLE_TITLES, first_shown
from lowbits.study._methods import cell, shade
from lowbits.study._records import writing
from lowbits.study._summary import Summary, summarize

VERDICTS = {
    "same": "no difference seen",
    "better": "better",
    "worse": "worse",
    "suggestive": "not settled",
    "unstable": "diverged",
    "single": "one seed",
    "none": "no result",
}


def render(summary: Summary) -> str:
    """Return the page.

    Args:
        summary: what `summarize` read.
    """
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

    files = resources.files("lowbits.study")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {
        name: getattr(_numbers, name) for name in ("nats", "with_spread", "sigmas", "decibels", "count", "size")
    }
    page.filters |= {"cell": cell, "shade": shade}
    page.filters |= {"duration": _numbers.duration, "ratio": _numbers.ratio}
    template = page.from_string((files / "report.html.j2").read_text(encoding="utf-8"))
    drawn = figures(summary)
    return template.render(
        summary=summary,
        arms=summary.arms,
        figures=drawn,
        method_figures=[name for name in drawn if name.startswith("method-")],
        colors=colors(summary.arms),
        histories=list(histories := error_histories(summary.arms)),
        first_history=first_shown(histories),
        roles=[(role, ROLE_TITLES[role]) for role in roles(summary.arms)],
        memory_legend=memory_legend(summary.arms),
        verdicts=VERDICTS,
        style=(files / "report.css").read_text(encoding="utf-8"),
        script=(files / "report.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
    )


def write_report(directory: Path) -> Summary:
    """Read the runs in a directory and write `report.html` and `report.json` there.

    Args:
        directory: what `compare` was given, or any folder of `<recipe>/seed-<n>` runs.
    Returns:
        The summary that both show.
    Raises:
        RunError: there are no runs, one is not readable, or the report cannot be written.
    """
    summary = summarize(directory)
    for name, text in (("report.json", summary.to_json()), ("report.html", render(summary))):
        aside = directory / f"{name}.tmp"
        with writing(directory / name):
            aside.write_text(text, encoding="utf-8")
            aside.replace(directory / name)
    return summary
