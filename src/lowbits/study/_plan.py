# SPDX-License-Identifier: Apache-2.0
"""Turn the names on the command line into arms: the baseline, its null control, the recipes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from lowbits.errors import RunError, UnknownNameError
from lowbits.methods import named
from lowbits.study._arms import BASELINE, NULL, RECIPE, Plan
from lowbits.study._changes import in_words, parted

if TYPE_CHECKING:
    from lowbits.nn import Recipe
    from lowbits.quantizers import QuantSpec

# The null control shares no seed with the baseline, however many seeds either has.
NULL_OFFSET = 1000
# The same words as in the papers: what a row of the GEMM's operand is, see lowbits.quantizers.
_ROWS_AND_COLUMNS = {
    ("weights", "fprop"): ("channel", "column"),
    ("weights", "dgrad"): ("column", "channel"),
    ("inputs", "fprop"): ("token", "column"),
    ("inputs", "wgrad"): ("column", "token"),
    ("gradients", "dgrad"): ("token", "column"),
    ("gradients", "wgrad"): ("column", "token"),
}


def plan(recipes: Sequence[str], seeds: Sequence[int]) -> list[Plan]:
    """Return the arms of a comparison; the first is the baseline.

    Args:
        recipes: `recipe` or `recipe+method`, the former a name of `lowbits.recipes.NAMED`, the latter what
            `lowbits.methods.named` reads; behind them `+keep.last=0.15`, `+82%:forward=off` and the like: layers that
            stay in high precision and phases of this arm alone. And `null`: the baseline again under seeds of its own,
            which shows what chance alone does.
        seeds: of every other arm.
    Raises:
        UnknownNameError: a recipe or a method does not exist.
        RunError: nothing to compare, a name twice, no seed, a seed twice, `null` in the first place, or a change that
            cannot be read.
    """
    _check(recipes, seeds)
    baseline = recipes[0]
    others = tuple(seed + NULL_OFFSET for seed in seeds)
    plans = []
    for name in recipes:
        recipe, method, changes = parted(baseline if name == NULL else name)
        role = BASELINE if name == baseline else NULL if name == NULL else RECIPE
        words = f"{baseline} again, other seeds" if name == NULL else quantizes(_named(recipe))
        if method and name != NULL:
            words += f", with {named(method).name}"
        words += "" if name == NULL else in_words(changes)
        plans.append(Plan(name, recipe, role, others if name == NULL else tuple(seeds), words, method, changes))
    for first, second in combinations(plans, 2):
        if first.folder == second.folder:
            raise RunError(f"compare: {first.name} and {second.name} would share the folder {first.folder}.")
    return plans


def _check(recipes: Sequence[str], seeds: Sequence[int]) -> None:
    if not recipes:
        raise RunError("compare: no recipe given; name at least a baseline, for example `bf16 w8a8`.")
    for what, given in (("recipe", recipes), ("seed", seeds)):
        if twice := [item for item in dict.fromkeys(given) if list(given).count(item) > 1]:
            raise RunError(f"compare: {what} {twice[0]} is given {list(given).count(twice[0])} times; give it once.")
    if not seeds or min(seeds) < 0:
        raise RunError(f"compare: seeds must be at least one number >= 0, got {list(seeds)}.")
    if recipes[0] == NULL:
        raise RunError("compare: `null` repeats the baseline, so it cannot come first; put the baseline before it.")


def _named(name: str) -> Recipe:
    from lowbits import recipes

    if name not in recipes.NAMED:
        raise UnknownNameError("recipe", name, [*recipes.NAMED, NULL], where="lowbits recipes")
    return recipes.named(name)


def quantizes(recipe: Recipe) -> str:
    """Return what a recipe quantizes, operand by operand, in words.

    >>> from lowbits.nn import Recipe
    >>> quantizes(Recipe())
    'nothing'
    """
    uses: dict[tuple[str, str], list[str]] = {}
    for (operand, gemm), axes in _ROWS_AND_COLUMNS.items():
        spec = _operand(recipe, operand, gemm)
        if spec is not None:
            uses.setdefault((operand, _spec_words(spec, axes)), []).append(gemm)
    parts = [f"{operand} {words}{_where(operand, gemms)}" for (operand, words), gemms in uses.items()]
    for name, spec in (("first moment", recipe.first_moment), ("second moment", recipe.second_moment)):
        if spec is not None:
            parts.append(f"{name} {_spec_words(spec, ('channel', 'column'))}")
    return ", ".join(parts) or "nothing"


def _operand(recipe: Recipe, operand: str, gemm: str) -> QuantSpec | None:
    left = "inputs" if gemm == "fprop" else "gradients"
    operands = recipe.gemms[gemm]
    return operands.lhs if operand == left else operands.rhs


def _spec_words(spec: QuantSpec, axes: tuple[str, str]) -> str:
    """`int8 per channel`: the spec's own words with its rows and columns named."""
    number, *rest = str(spec).split(" ")
    rest[0] = {"row": axes[0], "column": axes[1]}.get(rest[0], rest[0])
    return f"{number} per {' '.join(rest)}"


def _where(operand: str, gemms: Sequence[str]) -> str:
    """Name the GEMMs where the operand is quantized, unless it is the plain forward pass."""
    return "" if operand != "gradients" and list(gemms) == ["fprop"] else f" ({', '.join(gemms)})"
