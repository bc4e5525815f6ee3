# SPDX-License-Identifier: Apache-2.0
"""`lowbits formats`: every number format, or every code of one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import tyro
from rich.console import Console
from rich.table import Table

from lowbits import formats
from lowbits.cli._options import parse
from lowbits.errors import UnknownNameError
from lowbits.formats import FloatFormat, Format

__all__ = ["Formats", "main"]

_EXAMPLES = """  lowbits formats
  lowbits formats e2m1"""
_COLUMNS = ("format", "bits", "codes", "lowest", "largest", "smallest normal", "smallest above 0", "zero", "NaN")


@dataclass(frozen=True)
class Formats:
    """Print the table of all number formats, or every code of one and what it stands for.

    Args:
        name: a format, to see its codes.
    """

    name: tyro.conf.Positional[str | None] = None


def main(arguments: Sequence[str]) -> int:
    """Run `lowbits formats`.

    Args:
        arguments: the words after it.

    Returns:
        0.
    """
    name = parse(Formats, arguments, prog="lowbits formats", examples=_EXAMPLES).name
    console = Console(highlight=False, width=None if Console().is_terminal else 120)
    console.print(_overview() if name is None else _codes(name))
    return 0


def _overview() -> Table:
    table = Table(*_COLUMNS)
    for column in table.columns[1:]:
        column.justify = "right"
    for fmt in formats.ALL:
        table.add_row(*_row(fmt))
    return table


def _row(fmt: Format) -> list[str]:
    normal = 2.0**fmt.min_normal_exponent if isinstance(fmt, FloatFormat) else None
    return [
        fmt.name,
        str(fmt.bits),
        str(1 << fmt.bits),
        f"{fmt.min:.6g}",
        f"{fmt.max:.6g}",
        "-" if normal is None else f"{normal:.6g}",
        f"{fmt.smallest:.6g}",
        "yes" if fmt.has_zero else "no",
        "yes" if fmt.has_nan else "no",
    ]


def _codes(name: str) -> Table:
    known = {fmt.name: fmt for fmt in formats.ALL}
    if name not in known:
        raise UnknownNameError("format", name, known, where="lowbits formats")
    fmt = known[name]
    table = Table("code", "bits", "value", title=f"{name}, {fmt.bits} bits")
    for code, value in enumerate(fmt.code_values):
        table.add_row(str(code), f"{code:0{math.ceil(fmt.bits)}b}", f"{value:.10g}")
    return table
