# SPDX-License-Identifier: Apache-2.0
"""Named recipes. A new family is one new file with a `RECIPES` dict, and one line here."""

from lowbits.errors import UnknownNameError
from lowbits.nn import Recipe
from lowbits.recipes import bitnet, fp8, int8, linear_quantization, microscaling, nvfp4, optimizer_states

__all__ = ["FAMILIES", "NAMED", "named"]

FAMILIES: dict[str, dict[str, Recipe]] = {
    "high precision": {"bf16": Recipe()},
    "linear quantization": linear_quantization.RECIPES,
    "INT8": int8.RECIPES,
    "FP8": fp8.RECIPES,
    "NVFP4": nvfp4.RECIPES,
    "microscaling": microscaling.RECIPES,
    "BitNet": bitnet.RECIPES,
    "optimizer states": optimizer_states.RECIPES,
}
"""Recipes by family, in the order of the tables."""

NAMED: dict[str, Recipe] = {name: recipe for family in FAMILIES.values() for name, recipe in family.items()}
"""Every named recipe."""


def named(name: str) -> Recipe:
    """Return the recipe called `name`.

    Raises:
        UnknownNameError: there is none; the message offers the nearest.
    """
    if name not in NAMED:
        raise UnknownNameError("recipe", name, NAMED, where="lowbits recipes")
    return NAMED[name]
