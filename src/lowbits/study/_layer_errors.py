# SPDX-License-Identifier: Apache-2.0
"""Which layers of a run lost most to quantization, and when: read from its log, and drawn."""

from __future__ import annotations

import os.path
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from lowbits.study._records import Line, finite

Numbers: TypeAlias = dict[str, float | None]
Layers: TypeAlias = dict[str, dict[str, Numbers]]
Figure: TypeAlias = dict[str, Any]

ROLE_TITLES = {"weight": "Weights", "input": "Inputs", "grad": "Gradients"}
METRICS = {
    "sqnr_db": ("SQNR (dB)", ".0f"),
    "zero": ("Flushed to zero", ".1%"),
    "clipped": ("Clipped", ".1%"),
}
# Darker is worse, in every map.
SCALE = ((0.0, "#f4f7fb"), (0.35, "#b9d2e8"), (0.7, "#4f86b8"), (1.0, "#123a63"))
_MOST_COLUMNS = 24
_MOST_NUMBERS = 60  # layers beside which the last measurement is written


@dataclass(frozen=True)
class Worst:
    """The layer that fares worst in one role, at the last measurement.

    Args:
        role: `weight`, `input` or `grad`.
        layer: its name.
        gemm: `fprop`, `dgrad` or `wgrad`, where the role is quantized differently for two GEMMs; else empty.
        sqnr_db: its signal-to-noise ratio; None where a number was not finite.
        median_db: of all layers in this role.
        nonfinite: whether the operand held NaN or infinities.
    """

    role: str
    layer: str
    gemm: str
    sqnr_db: float | None
    median_db: float | None
    nonfinite: bool


@dataclass(frozen=True)
class ErrorHistory:
    """Errors by role, metric, layer and step: `values[role][metric][layer][step]`.

    Args:
        steps: of the measurements, at most 24 of them, evenly chosen; the last one is always there.
        layers: in the order of the model.
        values: None where an operand is in high precision at that step, or a number was not finite.
    """

    steps: tuple[int, ...] = ()
    layers: tuple[str, ...] = ()
    values: dict[str, dict[str, list[list[float | None]]]] = field(default_factory=dict)


def layers_of(line: Line) -> Layers:
    """Return the numbers of one errors line; operands without any (not quantized) are left out."""
    return {
        layer: {
            role: {name: finite(value) for name, value in numbers.items()} for role, numbers in roles.items() if numbers
        }
        for layer, roles in line.get("layers", {}).items()
    }


def history(lines: Sequence[Line]) -> ErrorHistory:
    """Return the errors of one run over its steps.

    Args:
        lines: its errors lines, in the order of the steps.
    """
    chosen = _evenly(lines)
    measured = [layers_of(line) for line in chosen]
    layers = tuple(dict.fromkeys(layer for found in measured for layer in found))
    seen = {role for found in measured for roles in found.values() for role in roles}
    values = {
        role: {
            metric: [[found.get(layer, {}).get(role, {}).get(metric) for found in measured] for layer in layers]
            for metric in METRICS
        }
        for role in ROLE_TITLES
        if role in seen
    }
    return ErrorHistory(tuple(int(line["step"]) for line in chosen), layers, values)


def _evenly(lines: Sequence[Line]) -> list[Line]:
    if len(lines) <= _MOST_COLUMNS:
        return list(lines)
    last = len(lines) - 1
    return [lines[round(i * last / (_MOST_COLUMNS - 1))] for i in range(_MOST_COLUMNS)]


def worst_layers(layers: Layers) -> tuple[Worst, ...]:
    """Return the worst layer of every role that was measured; one that is not finite is worse than any other.

    Args:
        layers: the last measurement.
    """
    found = []
    for role in ROLE_TITLES:
        numbers = {layer: roles[role] for layer, roles in layers.items() if role in roles}
        if not numbers:
            continue
        known = [db for n in numbers.values() if (db := n.get("sqnr_db")) is not None]
        layer = min(numbers, key=lambda name: _order(numbers[name]))
        found.append(
            Worst(
                role,
                layer,
                _gemm(layers[layer], role),
                numbers[layer].get("sqnr_db"),
                statistics.median(known) if known else None,
                _is_nonfinite(numbers[layer]),
            )
        )
    return tuple(found)


def _is_nonfinite(numbers: Numbers) -> bool:
    # None for an error that is not finite; an exact operand has an infinite SQNR, but the error 0.
    return bool(numbers.get("nonfinite")) or ("relative_error" in numbers and numbers["relative_error"] is None)


def _order(numbers: Numbers) -> float:
    decibels = numbers.get("sqnr_db")
    if _is_nonfinite(numbers):
        return float("-inf")
    return float("inf") if decibels is None else decibels


def _gemm(roles: dict[str, Numbers], role: str) -> str:
    """The GEMM whose operand a role's numbers are: the log names the operands where they differ."""
    same = (key for key, numbers in roles.items() if "." in key and numbers == roles[role])
    return next(same, "").partition(".")[0]


def history_map(histories: dict[str, ErrorHistory], role: str) -> Figure:
    """Return layers by steps for one role: two traces an arm and metric, of which the page shows one pair at a time.

    The first is the map, the second the last measurement in numbers, the worst in bold. `meta` is `arm|metric`.

    Args:
        histories: by arm, each with more than one step.
        role: `weight`, `input` or `grad`.
    """
    with_role = {arm: h for arm, h in histories.items() if role in h.values}
    first = first_shown(histories)
    traces = [
        trace | {"visible": arm == first and metric == "sqnr_db", "meta": f"{arm}|{metric}"}
        for arm, found in with_role.items()
        for metric in METRICS
        for trace in (_map(found, role, metric, _range(metric, found)), _last(found, role, metric))
    ]
    rows = max((len(h.layers) for h in with_role.values()), default=0)
    x_axis = {
        "title": {"text": "step", "font": {"size": 12, "color": "#5b6475"}},
        "type": "category",
        "showgrid": False,
    }
    y_axis = {"autorange": "reversed", "showgrid": False, "tickfont": {"size": 11}, "type": "category"}
    return {"data": traces, "height": 74 + 19 * rows, "xaxis": x_axis, "yaxis": y_axis}


def _map(found: ErrorHistory, role: str, metric: str, span: tuple[float, float]) -> Figure:
    title, digits = METRICS[metric]
    return {
        "type": "heatmap",
        "name": title,
        "x": [*map(str, found.steps), ""],  # a column more, for the numbers
        "y": short_names(found.layers),
        "z": [[*row, None] for row in found.values[role][metric]],
        "zmin": span[0],
        "zmax": span[1],
        "colorscale": SCALE,
        "reversescale": metric == "sqnr_db",
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
        "hovertemplate": f"%{{y}}<br>step %{{x}}<br>{title}: %{{z:{digits}}}<extra></extra>",
    }


def _last(found: ErrorHistory, role: str, metric: str) -> Figure:
    rows = found.values[role][metric]
    last = [row[-1] for row in rows]
    known = [value for value in last if value is not None]
    worst = (min if metric == "sqnr_db" else max)(known, default=None)
    digits = METRICS[metric][1]

    def told(value: float | None) -> str:
        if value is None or (len(rows) > _MOST_NUMBERS and value != worst):
            return ""
        text = f"{value:{digits}}"
        return f"<b>{text}</b>" if value == worst else text

    return {
        "type": "scatter",
        "mode": "text",
        "x": [""] * len(rows),
        "y": short_names(found.layers),
        "text": [told(value) for value in last],
        "textfont": {"size": 11},
        "hoverinfo": "skip",
        "cliponaxis": False,
    }


def first_shown(histories: dict[str, ErrorHistory]) -> str | None:
    """Return the arm whose maps are shown at first: the one with most roles.

    Args:
        histories: by arm.
    """
    return max(histories, key=lambda arm: len(histories[arm].values), default=None)


def _range(metric: str, found: ErrorHistory) -> tuple[float, float]:
    """One scale for all roles, so that their maps can be compared."""
    rows = [row for metrics in found.values.values() for row in metrics[metric]]
    return span_of(metric, [value for row in rows for value in row if value is not None])


def span_of(metric: str, known: Sequence[float]) -> tuple[float, float]:
    """Return the ends of a metric's colours; shares never fill them below one percent.

    Args:
        metric: its name in the log.
        known: all values that are shown.
    """
    if metric == "sqnr_db":
        return min(known, default=0.0), max([*known, 1.0])
    return 0.0, max([*known, 0.01])


def short_names(layers: Sequence[str]) -> list[str]:
    """Return the names without the prefix that all share, cut at a dot.

    >>> short_names(["transformer.h.0.mlp", "transformer.h.1.mlp"])
    ['0.mlp', '1.mlp']
    """
    shared = os.path.commonprefix(list(layers)).rpartition(".")[0] if len(layers) > 1 else ""
    return [layer.removeprefix(f"{shared}.") if shared else layer for layer in layers]
