# SPDX-License-Identifier: Apache-2.0
"""Draw a dependency graph: a row for every parameter, a lane for every dimension, a dot where they meet."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from torch import Tensor

from lowbits.methods.geta._graph import Dimension, Graph

ROW, LANE, LEFT, TOP = 18, 14, 380, 60
_COLOURS = ("#2f6fb3", "#c4572d", "#3a8f5c", "#8a5bb0", "#b0892a", "#4a9aa8", "#b0476b", "#6b7280")
# Under a class of its own: a style within an SVG holds for the whole page that it stands in.
_STYLE = (
    ".geta text{font:12px system-ui,sans-serif;fill:currentColor}.geta .n{opacity:.65}.geta .r{fill:transparent}"
    ".geta .r:hover{fill:currentColor;fill-opacity:.08}"
)


def svg(graph: Graph, keep: Tensor | None = None) -> str:
    """Return the drawing as an SVG of its own.

    A filled dot: the slices are driven to zero. A ring: they are cut at the end. Lanes that do not overlap share a
    column. A title on every dot says which axis it is and how many units there are.

    Args:
        graph: of a model.
        keep: bool `[units]`, which units are left, if some are gone.
    """
    left = _left(graph, keep)
    rows = _rows(graph)
    lanes = _columns([(min(found), max(found)) for found in (_places(d, rows) for d in graph.dimensions)])
    width = LEFT + LANE * (max(lanes, default=0) + 2) + 20
    height = TOP + ROW * len(rows) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'class="geta" role="img" aria-label="dependency graph"><style>{_STYLE}</style>',
        f'<text x="10" y="22" font-weight="600">{len(graph.dimensions)} dimensions, {graph.units:,} units'
        f"{'' if keep is None else f', {int(keep.sum()):,} left'}</text>",
        '<text class="n" x="10" y="40">a lane: slices that go together; filled: driven to zero</text>',
    ]
    for name, place in rows.items():
        y = TOP + ROW * place
        parts.append(f'<rect class="r" x="0" y="{y - 13}" width="{width}" height="{ROW}"/>')
        parts.append(f'<text x="10" y="{y}">{escape(_short(name))}</text>')
    for number, (dimension, lane) in enumerate(zip(graph.dimensions, lanes, strict=True)):
        parts += _lane(dimension, left[number], rows, LEFT + LANE * lane, _COLOURS[number % len(_COLOURS)])
    return "\n".join([*parts, "</svg>"])


def _left(graph: Graph, keep: Tensor | None) -> list[str]:
    """Say of every dimension how many units it has, and how many are left."""
    sizes = [dimension.size for dimension in graph.dimensions]
    if keep is None:
        return [f"{size:,} units" for size in sizes]
    return [f"{int(part.sum()):,} of {size:,} units" for part, size in zip(keep.cpu().split(sizes), sizes, strict=True)]


def page(graph: Graph, title: str) -> str:
    """Return a self-contained HTML page: the drawing, the dimensions, and what cannot be cut with the reason.

    Args:
        graph: of a model.
        title: of the page.
    """
    cut = [(d.name, f"{d.size:,}", ", ".join(d.layers)) for d in graph.dimensions]
    whole = [(k.name, f"{k.size:,}", k.reason) for k in graph.kept]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>:root'
        "{color-scheme:light dark}body{font:14px system-ui,sans-serif;margin:2rem;max-width:75rem}"
        "table{border-collapse:collapse}"
        "td,th{text-align:left;padding:.2rem .8rem .2rem 0;vertical-align:top}td:nth-child(2){text-align:right}"
        f".scroll{{overflow-x:auto}}</style><h1>{escape(title)}</h1><h2>Can be cut</h2>"
        f"{_table(('dimension', 'units', 'layers'), cut)}<h2>Cannot be cut</h2>"
        f"{_table(('slices of', 'number', 'reason'), whole)}<h2>Drawing</h2>"
        f'<div class="scroll">{svg(graph)}</div></html>\n'
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{"".join(f"<th>{h}</th>" for h in head)}</tr>{cells}</table></div>'


def _rows(graph: Graph) -> dict[str, int]:
    """Number the parameters that have members, in the order in which the network reads them."""
    wanted = {member.name for dimension in graph.dimensions for member in dimension.members}
    order: list[str] = []
    for node in graph.module.graph.nodes:
        for source in node.all_input_nodes:
            name = str(source.target)
            if source.op == "get_attr" and name in wanted and name not in order:
                order.append(name)
                wanted.discard(name)
    return {name: place for place, name in enumerate([*order, *sorted(wanted)])}


def _places(dimension: Dimension, rows: dict[str, int]) -> list[int]:
    return [rows[member.name] for member in dimension.members]


def _columns(spans: Sequence[tuple[int, int]]) -> list[int]:
    """Return the first free column of every span, so that no two overlap in one."""
    ends: list[int] = []
    columns = []
    for begin, end in spans:
        column = next((i for i, last in enumerate(ends) if last < begin), len(ends))
        if column == len(ends):
            ends.append(end)
        ends[column] = max(ends[column], end)
        columns.append(column)
    return columns


def _lane(dimension: Dimension, units: str, rows: dict[str, int], x: int, colour: str) -> list[str]:
    places = _places(dimension, rows)
    y = [TOP + ROW * place - 4 for place in (min(places), max(places))]
    parts = [f'<line x1="{x}" y1="{y[0]}" x2="{x}" y2="{y[1]}" stroke="{colour}" stroke-width="2"/>']
    for member, place in zip(dimension.members, places, strict=True):
        fill = colour if member.zeroed else "Canvas"
        words = f"{dimension.name}, {units}: {member.name}, axis {member.axis}"
        parts.append(
            f'<circle cx="{x}" cy="{TOP + ROW * place - 4}" r="4" fill="{fill}" stroke="{colour}" stroke-width="2">'
            f"<title>{escape(words)}</title></circle>"
        )
    return parts


def _short(name: str, most: int = 54) -> str:
    return name if len(name) <= most else f"...{name[3 - most :]}"
