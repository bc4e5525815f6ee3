# SPDX-License-Identifier: Apache-2.0
"""Draw what `lowbits probe` found: every layer's three errors on one line, in the order of the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from lowbits.analysis import LayerProbe

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_GEMMS = {
    "wgrad": ("dW (wgrad), +- over the batches", "#d55e00", "circle"),
    "dgrad": ("dX (dgrad)", "#0072b2", "diamond"),
    "fprop": ("Y (fprop)", "#7f8896", "square"),
}


def picture(found: Mapping[str, LayerProbe], kept: Collection[str], title: str) -> Figure:
    """Return the chart; layers to keep are shaded and bold.

    Args:
        found: by layer.
        kept: the proposal.
        title: heading.
    """
    import plotly.graph_objects as go

    names = list(found)
    figure = go.Figure()
    for gemm, (label, color, symbol) in _GEMMS.items():
        deviation = [layer.wgrad_deviation for layer in found.values()] if gemm == "wgrad" else None
        figure.add_scatter(
            x=[getattr(layer, gemm) for layer in found.values()],
            y=list(range(len(names))),
            mode="markers",
            name=label,
            marker={"color": color, "symbol": symbol, "size": 9},
            error_x={"array": deviation, "color": color, "thickness": 1} if deviation else None,
            customdata=names,
            hovertemplate="%{customdata}: %{x:.4f}<extra></extra>",
        )
    for row, name in enumerate(names):
        if name in kept:
            figure.add_hrect(y0=row - 0.5, y1=row + 0.5, fillcolor="#d55e00", opacity=0.12, line_width=0)
    labels = [f"<b>{name}</b>" if name in kept else name for name in names]
    figure.update_layout(
        title={"text": f"{title}<br><sub>shaded: proposed to stay in high precision</sub>"},
        height=150 + 22 * len(names),
        template="plotly_white",
        legend={"orientation": "h", "y": 1, "yanchor": "bottom", "x": 1, "xanchor": "right"},
        xaxis={"title": "relative error, Frobenius", "rangemode": "tozero"},
        yaxis={"tickvals": list(range(len(names))), "ticktext": labels, "range": [len(names) - 0.5, -0.5]},
        margin={"t": 110},
    )
    return figure
