# SPDX-License-Identifier: Apache-2.0
"""Draw a summary as Plotly figures: plain data, which the page hands to plotly.js.

Every trace of an arm carries the arm's name in `meta`, so that the page's one legend can hide it everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from lowbits.study._arms import BASELINE, NULL, Arm
from lowbits.study._curves import Curve
from lowbits.study._layer_errors import METRICS, ROLE_TITLES, SCALE, ErrorHistory, history_map, short_names, span_of
from lowbits.study._numbers import nats, size
from lowbits.study._phases import height
from lowbits.study._statistics import Noise
from lowbits.study._summary import Summary

Figure: TypeAlias = dict[str, Any]
CurveOf: TypeAlias = Callable[[Arm], Curve]

INK, MUTED, GRID = "#1d2433", "#5b6475", "#e6e9ef"
# Okabe and Ito's colours, which the colour-blind can tell apart, darkened for thin lines on white, and a few between.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b8569a", "#c48a00", "#56a3d9", "#7a4fb5", "#8a6d3b", "#c23b4a", "#3f7f7f")
MEMORY_COLORS = ("#2f5d8a", "#d08a3e", "#6b9080", "#a7b4c4", "#8d6a9f", "#c0717a")
_FONT = {
    "family": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif",
    "size": 13,
    "color": INK,
}
_NAMES_HEIGHT = 84
# A dot beyond this multiple of the resolvable gap would squeeze the others together: it is an arrow at the edge.
_OFF_SCALE = 8.0


def colors(arms: Sequence[Arm]) -> dict[str, str]:
    """Return the colour of every arm: the baseline black, its null control grey."""
    recipes = [arm.name for arm in arms if arm.role not in (BASELINE, NULL)]
    fixed = {arm.name: INK if arm.role == BASELINE else "#8b93a3" for arm in arms if arm.role in (BASELINE, NULL)}
    return fixed | {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(recipes)}


def figures(summary: Summary) -> dict[str, Figure]:
    """Return every chart of the page by its name; one without data is left out."""
    arms = summary.arms
    drawn = {
        "gaps": gap_chart(arms, summary.noise),
        "validation": curve_chart(arms, _validation, "validation loss (nats)", _loss_range(arms, _validation)),
        "training": curve_chart(arms, _training, "training loss, smoothed (nats)", _loss_range(arms, _training)),
        "gap-curve": with_band(
            curve_chart(arms, _gap_curve, "gap to the baseline (nats)", _gap_range(arms, summary.noise)), summary.noise
        ),
        "memory": memory_chart(arms),
        **{
            f"method-{name}": method_chart(arms, name)
            for name in dict.fromkeys(n for a in arms for n in a.method_curves)
        },
        **{f"errors-{role}": error_map(arms, role) for role in roles(arms)},
        **{f"history-{role}": history_chart(arms, role) for role in roles(arms)},
    }
    return {name: figure for name, figure in drawn.items() if figure["data"]}


def _validation(arm: Arm) -> Curve:
    return arm.validation


def _training(arm: Arm) -> Curve:
    return arm.training


def _gap_curve(arm: Arm) -> Curve:
    return arm.gap_curve


def _layout(height: int, **more: object) -> Figure:
    axis = {
        "gridcolor": GRID,
        "zeroline": False,
        "linecolor": GRID,
        "ticks": "",
        "automargin": True,
        "fixedrange": False,
    }
    layout = {
        "height": height,
        "autosize": True,
        "font": _FONT,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "showlegend": False,
        "hoverlabel": {"bgcolor": "#ffffff", "bordercolor": GRID, "font": {"color": INK}},
        "xaxis": axis,
        "yaxis": axis,
    }
    for key, value in more.items():
        layout[key] = layout[key] | value if isinstance(value, dict) and isinstance(layout.get(key), dict) else value
    return layout


def curve_chart(arms: Sequence[Arm], curve_of: CurveOf, title: str, y_range: tuple[float, float] | None) -> Figure:
    """Return one line an arm over the tokens seen, with the range over its seeds as a band.

    Args:
        arms: the arms.
        curve_of: which of an arm's curves.
        title: of the vertical axis.
        y_range: of the vertical axis; None lets plotly choose.
    """
    palette = colors(arms)
    traces: list[Figure] = []
    for arm in arms:
        curve = curve_of(arm)
        if curve.step:
            traces += _band(arm, curve, palette[arm.name]), _line(arm, curve, palette[arm.name])
            traces += [_phases(arm, curve, palette[arm.name])] if arm.phases else []
    y_axis: Figure = {"title": {"text": title, "font": {"size": 12, "color": MUTED}}}
    if y_range:
        y_axis["range"] = y_range
    x_axis = {"title": {"text": "tokens", "font": {"size": 12, "color": MUTED}}, "rangemode": "tozero"}
    return {"data": traces, "layout": _layout(340, xaxis=x_axis, yaxis=y_axis, hovermode="closest")}


def method_chart(arms: Sequence[Arm], name: str) -> Figure:
    """Return one number of the arms' methods over the tokens seen."""
    figure = curve_chart(arms, lambda arm: arm.method_curves.get(name, Curve()), name, None)
    for trace in figure["data"]:
        if "hovertemplate" in trace:
            trace["hovertemplate"] = trace["hovertemplate"].replace(":.4f} nats", ":.4g}")
    return figure


def _line(arm: Arm, curve: Curve, color: str) -> Figure:
    dash = "dash" if arm.role == NULL else "solid"
    return {
        "type": "scatter",
        "mode": "lines",
        "meta": arm.name,
        "name": arm.name,
        "x": curve.tokens,
        "y": curve.mean,
        "line": {"color": color, "width": 2.4 if arm.role == BASELINE else 1.8, "dash": dash},
        "hovertemplate": f"<b>{arm.name}</b><br>%{{y:.4f}} nats at %{{x:,}} tokens<extra></extra>",
    }


def _phases(arm: Arm, curve: Curve, color: str) -> Figure:
    """A mark where each phase begins."""
    return {
        "type": "scatter",
        "mode": "markers",
        "meta": arm.name,
        "x": [mark.tokens for mark in arm.phases],
        "y": [height(curve, mark.tokens) for mark in arm.phases],
        "text": [f"after step {mark.step}: {mark.words}" for mark in arm.phases],
        "marker": {"color": color, "size": 9, "symbol": "diamond", "line": {"color": "#ffffff", "width": 1}},
        "hovertemplate": f"<b>{arm.name}</b><br>%{{text}}<extra></extra>",
    }


def _band(arm: Arm, curve: Curve, color: str) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "meta": arm.name,
        "x": [*curve.tokens, *reversed(curve.tokens)],
        "y": [*curve.high, *reversed(curve.low)],
        "fill": "toself",
        "fillcolor": _translucent(color, 0.14),
        "line": {"width": 0},
        "hoverinfo": "skip",
    }


def _translucent(color: str, alpha: float) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def _loss_range(arms: Sequence[Arm], curve_of: CurveOf) -> tuple[float, float] | None:
    """From the lowest loss to where the baseline began: a run that blew up leaves the chart."""
    baseline = curve_of(arms[0])
    lows = [low for arm in arms for low in curve_of(arm).low]
    if not baseline.high or not lows:
        return None
    bottom, top = min(lows), max(baseline.high)
    return bottom - 0.04 * (top - bottom), top + 0.06 * (top - bottom)


def _gap_range(arms: Sequence[Arm], noise: Noise) -> tuple[float, float] | None:
    """What the second half of training shows: the gaps of the first steps say little and would hide the rest."""
    late = [v for arm in arms for v in arm.gap_curve.mean[len(arm.gap_curve.mean) // 2 :]]
    if not late:
        return None
    edge = 2 * noise.resolvable if noise.resolvable else 0.01
    low, high = min(*late, -edge), max(*late, edge)
    if noise.resolvable:
        low, high = max(low, -2 * _OFF_SCALE * noise.resolvable), min(high, 2 * _OFF_SCALE * noise.resolvable)
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def with_band(figure: Figure, noise: Noise) -> Figure:
    """Return the figure with what chance alone does shaded across its height."""
    figure["layout"]["shapes"] = _noise_shapes(noise, "y")
    return figure


def _noise_shapes(noise: Noise, axis: str) -> list[Figure]:
    """The light band (all comparisons at once), the dark one (a single comparison), and the line at zero."""
    other = "x" if axis == "y" else "y"
    across = {f"{other}ref": "paper", f"{other}0": 0, f"{other}1": 1, "type": "rect", "layer": "below"}
    shapes = [
        across | {f"{axis}0": -half, f"{axis}1": half, "fillcolor": f"rgba(29,36,51,{alpha})", "line": {"width": 0}}
        for half, alpha in ((noise.resolvable, 0.05), (noise.band, 0.08))
        if half
    ]
    zero = {f"{axis}0": 0, f"{axis}1": 0, "line": {"color": MUTED, "width": 1}}
    return [*shapes, across | {"type": "line"} | zero]


def gap_chart(arms: Sequence[Arm], noise: Noise) -> Figure:
    """Return the final gap of every arm with its standard error, its single runs, and the noise band."""
    shown = [arm for arm in arms if arm.loss_on.mean is not None]
    reference = arms[0].loss_on.mean
    if reference is None or len(shown) < 2:
        return {"data": [], "layout": {}}
    limit = _OFF_SCALE * noise.resolvable if noise.resolvable else float("inf")
    palette = colors(arms)
    traces = [_runs_of(arm, row, reference, limit, palette[arm.name]) for row, arm in enumerate(shown)]
    traces += [_dot(arm, row, limit, palette[arm.name]) for row, arm in enumerate(shown)]
    labels = [f"{arm.name}<br><b>{nats(arm.gap.nats, signed=True) if arm.gap else 'baseline'}</b>" for arm in shown]
    y_axis = {
        "tickvals": list(range(len(shown))),
        "ticktext": labels,
        "range": [len(shown) - 0.5, -0.5],
        "showgrid": False,
    }
    x_axis = {
        "title": {"text": f"final validation loss minus {arms[0].name} (nats)", "font": {"size": 12, "color": MUTED}}
    }
    layout = _layout(90 + 46 * len(shown), xaxis=x_axis, yaxis=y_axis, shapes=_noise_shapes(noise, "x"))
    return {"data": traces, "layout": layout}


def _runs_of(arm: Arm, row: int, reference: float, limit: float, color: str) -> Figure:
    gaps = [loss - reference for loss in arm.loss_on.values]
    inside = [gap for gap in gaps if abs(gap) < limit]
    return {
        "type": "scatter",
        "mode": "markers",
        "meta": arm.name,
        "x": inside,
        "y": [row + 0.24] * len(inside),
        "marker": {"color": _translucent(color, 0.45), "size": 6},
        "hovertemplate": f"<b>{arm.name}</b>, one run: %{{x:+.4f}}<extra></extra>",
    }


def _dot(arm: Arm, row: int, limit: float, color: str) -> Figure:
    gap = arm.gap.nats if arm.gap else 0.0
    error = arm.gap.standard_error if arm.gap else None
    off = abs(gap) > limit
    symbol = ("triangle-right" if gap > 0 else "triangle-left") if off else "circle"
    dot: Figure = {
        "type": "scatter",
        "mode": "markers",
        "meta": arm.name,
        "x": [min(max(gap, -limit), limit)],
        "y": [row],
        "marker": {"color": color, "size": 11, "symbol": symbol},
        "hovertemplate": f"<b>{arm.name}</b>: {nats(gap, signed=True)} ± {nats(error)}<extra></extra>",
    }
    if error is not None and not off:
        dot["error_x"] = {"type": "data", "array": [error], "color": color, "thickness": 1.6, "width": 5}
    return dot


def memory_chart(arms: Sequence[Arm]) -> Figure:
    """Return two stacked bars an arm: bytes as measured, and as they would be stored in few bits."""
    shown = [arm for arm in arms if arm.memory_measured]
    names = list(dict.fromkeys(name for arm in shown for name in arm.memory_measured))
    traces: list[Figure] = []
    notes: list[Figure] = []
    for row, arm in enumerate(shown):
        for offset, kind, ledger in ((-0.2, "measured", arm.memory_measured), (0.2, "in few bits", arm.memory_stored)):
            traces += _stack(names, ledger, row + offset, kind)
            notes.append(_bar_note(sum(ledger.values()), row + offset))
    ticks = {
        "tickvals": list(range(len(shown))),
        "ticktext": [a.name for a in shown],
        "range": [len(shown) - 0.5, -0.5],
    }
    longest = max((sum(arm.memory_measured.values()) for arm in shown), default=0.0)
    x_axis = {"range": [0, 1.25 * longest], "showticklabels": False, "showgrid": False}
    layout = _layout(
        30 + 46 * len(shown), barmode="overlay", yaxis=ticks | {"showgrid": False}, xaxis=x_axis, annotations=notes
    )
    return {"data": traces, "layout": layout}


def memory_legend(arms: Sequence[Arm]) -> dict[str, str]:
    """Return the colour of every category of memory."""
    names = list(dict.fromkeys(name for arm in arms for name in arm.memory_measured))
    return {name.replace("_", " "): MEMORY_COLORS[i % len(MEMORY_COLORS)] for i, name in enumerate(names)}


def _stack(names: Sequence[str], ledger: dict[str, float], y: float, kind: str) -> list[Figure]:
    traces: list[Figure] = []
    base = 0.0
    for i, name in enumerate(names):
        value = ledger.get(name, 0.0)
        traces.append({
            "type": "bar", "orientation": "h", "x": [value], "base": [base], "y": [y], "width": 0.34,
            "marker": {"color": MEMORY_COLORS[i % len(MEMORY_COLORS)], "opacity": 1.0 if kind == "measured" else 0.72},
            "hovertemplate": f"{name.replace('_', ' ')}, {kind}: {size(value)}<extra></extra>",
        })  # fmt: skip
        base += value
    return traces


def _bar_note(total: float, y: float) -> Figure:
    note = {"x": total, "y": y, "text": size(total), "showarrow": False, "xanchor": "left", "xshift": 5}
    return note | {"font": {"size": 11, "color": MUTED}}


def roles(arms: Sequence[Arm]) -> list[str]:
    """Return the roles of which an error was measured, weights first."""
    found = {role for arm in arms for operands in arm.errors.values() for role in operands}
    return [role for role in ROLE_TITLES if role in found]


def error_histories(arms: Sequence[Arm]) -> dict[str, ErrorHistory]:
    """Return the errors over the run of every arm that was measured more than once."""
    return {arm.name: h for arm in arms if len((h := arm.error_history).steps) > 1 and h.values}


def history_chart(arms: Sequence[Arm], role: str) -> Figure:
    """Return layers by steps, one arm at a time; without data where no arm was measured more than once."""
    histories = error_histories(arms)
    if not histories:
        return {"data": [], "layout": {}}
    drawn = history_map(histories, role)
    layout = _layout(drawn["height"], xaxis=drawn["xaxis"], yaxis=drawn["yaxis"])
    return {"data": drawn["data"], "layout": layout}


def error_map(arms: Sequence[Arm], role: str) -> Figure:
    """Return layers by arms; one trace a metric, of which the page shows one at a time."""
    shown = [arm for arm in arms if any(role in operands for operands in arm.errors.values())]
    layers = list(dict.fromkeys(layer for arm in shown for layer in arm.errors))
    traces = [_map_of(metric, role, shown, layers, arms) for metric in METRICS]
    x_axis = {"side": "top", "tickangle": -45, "showgrid": False, "automargin": False}
    y_axis = {"autorange": "reversed", "showgrid": False, "tickfont": {"size": 11}}
    layout = _layout(_NAMES_HEIGHT + 20 + 21 * len(layers), xaxis=x_axis, yaxis=y_axis)
    layout["margin"] |= {"t": _NAMES_HEIGHT, "r": 36}  # the slanted names of the arms, the same in every map
    return {"data": traces, "layout": layout}


def _map_of(metric: str, role: str, shown: Sequence[Arm], layers: Sequence[str], arms: Sequence[Arm]) -> Figure:
    title, digits = METRICS[metric]
    text = f"%{{z:{digits}}}"
    values = [[arm.errors.get(layer, {}).get(role, {}).get(metric) for arm in shown] for layer in layers]
    low, high = _metric_range(metric, arms)
    return {
        "type": "heatmap",
        "meta": metric,
        "name": title,
        "visible": metric == "sqnr_db",
        "x": [arm.name for arm in shown],
        "y": short_names(layers),
        "z": values,
        "zmin": low,
        "zmax": high,
        "colorscale": SCALE,
        "reversescale": metric == "sqnr_db",
        "showscale": False,
        "xgap": 2,
        "ygap": 2,
        "texttemplate": text if len(layers) <= 100 else "",
        "textfont": {"size": 11},
        "hovertemplate": f"%{{y}}<br>%{{x}}<br>{title}: {text}<extra></extra>",
    }


def _metric_range(metric: str, arms: Sequence[Arm]) -> tuple[float, float]:
    """One scale for all operands, so that maps can be compared."""
    numbers = [n.get(metric) for arm in arms for operands in arm.errors.values() for n in operands.values()]
    return span_of(metric, [n for n in numbers if n is not None])
