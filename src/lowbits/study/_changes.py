# SPDX-License-Identifier: Apache-2.0
"""What one arm changes in the run that all have in common: `nvfp4+keep.last=0.15+82%:forward=off`.

Behind the recipe, each after a plus: `keep.first=`, `keep.last=`, `keep.names=` with the values of the options of these
names, a phase as `--phases` takes it, and what is neither: a method.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from lowbits.errors import RunError
from lowbits.nn import Keep, Phase
from lowbits.train import Run

_KEEP = re.compile(r"keep\.(\w+)=(.+)")
_PHASE = re.compile(r"[\d.]+%?:.*")
# A plus within a number (1e+5, a value of a method) parts nothing.
_PLUS = re.compile(r"\+(?=keep\.|[\d.]+%?:|[^\d])")
# What a folder's name is better without, on some systems or in a shell.
_FOLDER = str.maketrans({"%": "pct", ":": "-", "*": "_", "?": "_", "[": "_", "]": "_", "/": "_"})


def parted(word: str) -> tuple[str, str, tuple[str, ...]]:
    """Return recipe, method (empty if none) and changes of an arm's word.

    >>> parted("w8a8+keep.last=2+gaussws,b_init=5+82%:forward=off")
    ('w8a8', 'gaussws,b_init=5', ('keep.last=2', '82%:forward=off'))
    """
    recipe, *parts = _PLUS.split(word)
    changes = tuple(part for part in parts if part.startswith("keep.") or _PHASE.fullmatch(part))
    return recipe, "+".join(part for part in parts if part not in changes), changes


def changed(run: Run, changes: Sequence[str]) -> Run:
    """Return the run of an arm.

    Args:
        run: what all arms have in common. What an arm keeps replaces that of the same name; its phases replace all.
        changes: as `parted` returned them.
    Raises:
        RunError: one of them cannot be read, or the phases do not follow each other within the run.
        SpecError: a count or a share of blocks is out of range.
    """
    keep = _kept(run.keep, [change for change in changes if change.startswith("keep.")])
    phases = tuple(Phase.parse(change) for change in changes if not change.startswith("keep."))
    return replace(run, keep=keep, phases=phases or run.phases)


def in_words(changes: Sequence[str]) -> str:
    """Return what the changes are, for a reader; empty if there are none."""
    keep = _kept(Keep(), [change for change in changes if change.startswith("keep.")])
    phases = [Phase.parse(change) for change in changes if not change.startswith("keep.")]
    told = [f"; high precision: {keep}"] if keep else []
    return "".join([*told, *(f"; from {str(phase).partition(':')[0]} on {phase.words}" for phase in phases)])


def folder_name(word: str) -> str:
    """Return the name of an arm's folder.

    >>> folder_name("w8a8+82%:forward=off")
    'w8a8+82pct-forward=off'
    """
    return word.translate(_FOLDER)


def _kept(keep: Keep, changes: Sequence[str]) -> Keep:
    names: list[str] = []
    for change in changes:
        match = _KEEP.fullmatch(change)
        if match is not None and match[1] == "names":
            names.append(match[2])
        elif match is not None and match[1] in ("first", "last") and re.fullmatch(r"\d*\.?\d+", match[2]):
            amount = int(match[2]) if match[2].isdigit() else float(match[2])
            keep = replace(keep, first=amount) if match[1] == "first" else replace(keep, last=amount)
        else:
            raise RunError(
                f"compare: {change!r} is not known; an arm keeps layers in high precision by keep.first=2, "
                "keep.last=0.15 or keep.names='*.mlp.c_proj'."
            )
    return replace(keep, names=tuple(names)) if names else keep
