# SPDX-License-Identifier: Apache-2.0
"""What a method told of its runs: numbers that became curves, and the tables of a finished run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from lowbits.study._curves import Curve, mean_curve, series
from lowbits.study._records import Line, Record

# As `lowbits.methods.Table` is written to result.json: title, columns, rows, note, shaded.
MethodTable: TypeAlias = dict[str, Any]
_DARKEST = 0.62  # of a shade: the number must stay readable on it


def method_curves(records: Sequence[Record]) -> dict[str, Curve]:
    """Return every number that the method measured over training, and validation losses of its forms of the model.

    Args:
        records: the runs of an arm.
    """
    told: list[list[Line]] = [[{**line, **line.get("method", {})} for line in r.steps] for r in records]
    names = dict.fromkeys(name for r in records for line in r.steps for name in line.get("method", {}))
    curves = {name: mean_curve([series(lines, name) for lines in told]) for name in names}
    forms = dict.fromkeys(n for r in records for line in r.evaluations for n in line if n.startswith("loss_"))
    for name in forms:
        if name not in ("loss_on", "loss_off"):
            shown = f"validation loss, {name.removeprefix('loss_')}"
            curves[shown] = mean_curve([series(r.evaluations, name) for r in records])
    return curves


def method_tables(result: Mapping[str, Any]) -> tuple[MethodTable, ...]:
    """Return the tables of a finished run; none of a run that has no method, or of an older version."""
    return tuple(result.get("tables") or ())


def cell(value: object) -> str:
    """Return a number in four digits, a text as it is, nothing for None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def shade(value: object, largest: float | None) -> str:
    """Return the style of a cell: the darker the larger, where the table is shaded."""
    if largest is None or isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return f"background:rgba(11,95,165,{_DARKEST * min(max(value / largest, 0.0), 1.0):.3f})"
