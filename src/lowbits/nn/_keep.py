# SPDX-License-Identifier: Apache-2.0
"""Say which linear layers stay in high precision, as data.

"Pretraining Large Language Models with NVFP4" (arXiv:2509.25149, sec. 4.1 and app. E.2) keeps about 15 % of the linear
layers in bfloat16, most of them in the last blocks: the first 2 and last 8 of 62 blocks, or the last 8 of 52.

Blocks are found in the tree of modules, whatever their names are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from fractions import Fraction

from torch import nn

from lowbits.errors import ConversionError, SpecError
from lowbits.nn._blocks import blocks, linear_names


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Keep linear layers in high precision; `convert_(model, recipe, keep=Keep(last=0.15))`.

    A block is an element of the outermost `nn.ModuleList`, numbered `nn.ModuleDict` or `nn.Sequential` of alike parts;
    several of them (an encoder and a decoder) count as one row. Elements without a linear layer are not counted.

    Args:
        first: that many blocks at the beginning, or their share as a number between 0 and 1: 0.15 is the nearest number
            of blocks to 15 % of them, at least one.
        last: likewise at the end.
        names: patterns of layer names with `*`, `?` and `[...]`, for example `*.mlp.c_proj` or `lm_head`.
    Raises:
        SpecError: a count is negative, or a share not between 0 and 1.

    >>> model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(10)])
    >>> list(Keep(first=1, last=0.15).layers(model))
    ['0', '8', '9']
    """

    first: int | float = 0
    last: int | float = 0
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for side in ("first", "last"):
            value = getattr(self, side)
            if value < 0 or (isinstance(value, float) and value != 0 and not 0 < value < 1):
                raise SpecError(
                    f"keep.{side} is a number of blocks (2) or a share of them between 0 and 1 (0.15), got {value}."
                )

    def __bool__(self) -> bool:
        """Whether anything is to be kept."""
        return bool(self.first or self.last or self.names)

    def __str__(self) -> str:
        """`first 2 and last 15 % of the blocks, lm_head`."""
        sides = [f"{side} {_amount(getattr(self, side))}" for side in ("first", "last") if getattr(self, side)]
        blocks = [f"{' and '.join(sides)} of the blocks"] if sides else []
        return ", ".join([*blocks, *self.names]) or "nothing"

    def layers(self, model: nn.Module) -> dict[str, str]:
        """Return the linear layers that stay in high precision, and why each does.

        Args:
            model: converted or not.
        Raises:
            ConversionError: a part of the rule matches nothing, or the model has no, or too few, blocks.
        """
        linear = linear_names(model)
        kept: dict[str, str] = {}
        if self.first or self.last:
            rows = blocks(model)
            for number, why in self._blocks(type(model).__name__, len(rows)).items():
                inside = [name for name in linear if f"{name}.".startswith(f"{rows[number]}.")]
                kept |= {name: why for name in inside}
        for pattern in self.names:
            # With a dot before it, a layer at the top is found by `*.lm_head` too.
            found = [name for name in linear if fnmatchcase(name, pattern) or fnmatchcase(f".{name}", pattern)]
            if not found:
                near = get_close_matches(pattern, linear, n=3, cutoff=0.3) or linear[:3]
                raise ConversionError(
                    f"keep.names: no linear layer of {type(model).__name__} is called {pattern!r}; there are "
                    f"{', '.join(near)}, ... A block with all its layers is `<block>.*`."
                )
            kept |= {name: f"keep.names {pattern!r}" for name in found if name not in kept}
        return kept

    def _blocks(self, model: str, total: int) -> dict[int, str]:
        """Number of a kept block -> which part of the rule keeps it."""
        if total == 0:
            raise ConversionError(
                f"{model} has no list of blocks (nn.ModuleList, nn.Sequential) that hold linear layers, so keep.first "
                "and keep.last mean nothing. Name the layers instead: keep.names."
            )
        first, last = (_count(value, total) for value in (self.first, self.last))
        if first + last > total:
            raise ConversionError(
                f"keep.first={self.first} and keep.last={self.last} are {first + last} blocks, {model} has {total}. "
                "Keep fewer."
            )
        head, tail = range(first), range(total - last, total)
        return {n: f"{_row(head, total)} (keep.first={self.first})" for n in head} | {
            n: f"{_row(tail, total)} (keep.last={self.last})" for n in tail
        }


def _count(value: int | float, total: int) -> int:
    """Blocks meant by a count or a share; decimal shares are exact, a half rounds up."""
    if isinstance(value, int) or value == 0:
        return int(value)
    return max(1, math.floor(Fraction(repr(value)) * total + Fraction(1, 2)))


def _row(numbers: range, total: int) -> str:
    several = f"blocks {numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"block {numbers[0]}"
    return f"{several} of {total}"


def _amount(value: int | float) -> str:
    return str(value) if isinstance(value, int) else f"{100 * value:g} %"
