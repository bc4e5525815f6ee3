# SPDX-License-Identifier: Apache-2.0
"""`lowbits recipes`: what each named recipe quantizes, and which of its GEMMs few-bit hardware could run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lowbits import recipes
from lowbits.cli._options import parse
from lowbits.nn import Recipe

__all__ = ["Recipes", "main"]

_EXAMPLES = """  lowbits recipes
  lowbits recipes w8a8g8"""
_LEGEND = """Three GEMMs a layer: fprop y = x w, dgrad dx = dy w, wgrad dw = dy x; shown is left x right operand.
hardware (of fprop, dgrad, wgrad): + integer or FP8 units could run it, x simulation only, . high precision.
`lowbits recipes NAME` says why."""


@dataclass(frozen=True)
class Recipes:
    """Print every named recipe, or all about one of them.

    Args:
        name: a recipe, to see it in full.
    """

    name: tyro.conf.Positional[str | None] = None


def main(arguments: Sequence[str]) -> int:
    """Run `lowbits recipes`.

    Args:
        arguments: the words after it.

    Returns:
        0.
    """
    name = parse(Recipes, arguments, prog="lowbits recipes", examples=_EXAMPLES).name
    console = Console(highlight=False, width=None if Console().is_terminal else 120)
    if name is not None:
        console.print(_details(name, recipes.named(name)), markup=False)
        return 0
    table = Table("recipe", "quantizes", "hardware", box=SIMPLE_HEAD)
    for family, members in recipes.FAMILIES.items():
        table.add_section()
        table.add_row(f"[dim]{family}[/dim]")
        for member, recipe in members.items():
            marks = " ".join(_mark(recipe, gemm) for gemm in recipe.gemms)
            table.add_row(member, str(recipe).removesuffix("; simulated"), marks)
    console.print(table)
    console.print(_LEGEND)
    return 0


def _mark(recipe: Recipe, gemm: str) -> str:
    if not any(recipe.gemms[gemm]):
        return "."
    return "x" if recipe.illegal(gemm) else "+"


def _details(name: str, recipe: Recipe) -> str:
    lines = [f"{name}: {recipe}"]
    for gemm, operands in recipe.gemms.items():
        sides = "high precision" if not any(operands) else f"{operands.lhs or '-'} x {operands.rhs or '-'}"
        reason = recipe.illegal(gemm)
        verdict = "could run on integer or FP8 units" if reason is None else f"simulation only, {reason}"
        lines.append(f"  {gemm}  {sides}" + (f": {verdict}" if any(operands) else ""))
    lines.append(f"  backward sees  {recipe.save.value} input and weight")
    lines.append(f"  moments  {recipe.first_moment or 'float32'}, {recipe.second_moment or 'float32'}")
    lines.append(f"  execution  {recipe.execution.value}")
    return "\n".join(lines)
