# SPDX-License-Identifier: Apache-2.0
"""Switch the quantizers of the forward and of the backward pass over a run, as data.

    (Phase(0, forward=False, backward=False), Phase(100))      the first 100 steps in high precision
    (Phase(0.82, forward=False),)                              the forward pass in high precision for the last 18 %

A phase lasts until the next one begins; before the first, everything is quantized. Which phase a step is in is a pure
function of the step, so a resumed run needs nothing to be in the right one.

"Pretraining Large Language Models with NVFP4" (arXiv:2509.25149, app. D): back in bfloat16 for the last 18 % of the
tokens, both passes close the gap in loss and the forward pass alone closes most of it; the backward pass alone nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache

from lowbits.errors import RunError
from lowbits.kernels import Execution
from lowbits.nn._recipe import Gemm, Recipe, Save

_SYNTAX = "START:SWITCHES, a step (200) or a share of the run (82%), then on, off, forward=off or backward=off"
_TEXT = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<percent>%?):(?P<switches>\S+)")
_SWITCHES = {"on": True, "off": False}


@dataclass(frozen=True)
class Phase:
    """Say which passes are quantized from a step on.

    Args:
        start: the first step, counted from 0; or the share of all steps that come before, as a number between 0 and 1.
        forward: whether fprop follows the layers' recipes; otherwise it is that of `nn.Linear`.
        backward: whether dgrad and wgrad do.
    Raises:
        RunError: the start is negative, or a share that leaves nothing of the run.

    >>> Phase(0.82, forward=False).first_step(steps=400)
    328
    """

    start: int | float
    forward: bool = True
    backward: bool = True

    def __post_init__(self) -> None:
        if not self.start >= 0 or (isinstance(self.start, float) and not self.start < 1):
            raise RunError(
                f"a phase starts at a step (200), or at a share of the run below 1 (0.82, or 82%), got {self.start}."
            )

    @classmethod
    def parse(cls, text: str) -> Phase:
        """Read `82%:forward=off`, `200:on`, `0:off`; what is not named is on.

        Args:
            text: as `str()` writes it.
        Raises:
            RunError: it is something else.
        """
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            raise RunError(f"{text!r} is no phase: {_SYNTAX}, for example 82%:forward=off.")
        number = Fraction(match["number"])
        share = bool(match["percent"]) or number.denominator > 1
        start = float(number / 100 if match["percent"] else number) if share else int(number)
        return cls(start, **_read_switches(text, match["switches"]))

    def first_step(self, steps: int) -> int:
        """Return the index of the first optimizer step of the phase.

        Args:
            steps: of the run.
        """
        return math.ceil(Fraction(repr(self.start)) * steps) if isinstance(self.start, float) else self.start

    def __str__(self) -> str:
        """`82%:forward=off`; `parse` reads it."""
        start = f"{100 * self.start:.10g}%" if isinstance(self.start, float) else str(self.start)
        off = [f"{name}=off" for name in ("forward", "backward") if not getattr(self, name)]
        return f"{start}:{('on', ','.join(off), 'off')[len(off)]}"

    @property
    def words(self) -> str:
        """`forward in high precision, backward quantized`."""
        kinds = {name: "quantized" if getattr(self, name) else "in high precision" for name in ("forward", "backward")}
        return ", ".join(f"{name} {kind}" for name, kind in kinds.items())


def phase_at(phases: Sequence[Phase], step: int, steps: int) -> Phase:
    """Return the phase that a step is in; everything is quantized before the first one begins.

    Args:
        phases: in the order of their starts.
        step: index of the optimizer step, 0 for the first.
        steps: of the run.
    """
    begun = [phase for phase in phases if phase.first_step(steps) <= step]
    return begun[-1] if begun else Phase(0)


def check_phases(phases: Sequence[Phase], steps: int) -> None:
    """Refuse phases that do not follow each other within a run.

    Args:
        phases: as given.
        steps: of the run.
    Raises:
        RunError: one begins where or before another does, beyond the run, or changes nothing.
    """
    before, reached = Phase(0), -1
    for phase in phases:
        first = phase.first_step(steps)
        if first >= steps:
            raise RunError(f"phase {phase} begins at step {first}, the run ends with step {steps - 1}. Start earlier.")
        if first == reached:
            raise RunError(f"phases {before} and {phase} overlap: both begin at step {first}. Leave one out.")
        if first < reached:
            raise RunError(f"phase {phase} (step {first}) comes after {before} (step {reached}). Order them by start.")
        if (phase.forward, phase.backward) == (before.forward, before.backward):
            raise RunError(f"phase {phase} changes nothing: {phase.words} is what comes before it too. Leave it out.")
        before, reached = phase, first


@cache  # one object for all layers of a recipe: compiled blocks compare recipes by identity
def during(recipe: Recipe, forward: bool, backward: bool) -> Recipe:
    """Return what a layer computes in a phase: its recipe without the operands of the passes that are off.

    What waits for backward follows: activations are saved in few bits while backward is quantized, and codes of what
    fprop multiplied need both passes, else backward would see quantized operands where it should not, or none would be
    there.

    Args:
        recipe: of the layer.
        forward: whether fprop is quantized.
        backward: whether dgrad and wgrad are.
    """
    if forward and backward:
        return recipe
    save = Save.ORIGINAL if recipe.save is Save.QUANTIZED or not backward else recipe.save
    fprop = recipe.fprop if forward else Gemm()
    dgrad, wgrad = (recipe.dgrad, recipe.wgrad) if backward else (Gemm(), Gemm())
    saved = recipe.saved_activations if backward else None
    # Native execution of nothing is refused.
    execution = recipe.execution if any((*fprop, *dgrad, *wgrad)) else Execution.SIMULATED
    return replace(
        recipe, fprop=fprop, dgrad=dgrad, wgrad=wgrad, save=save, saved_activations=saved, execution=execution
    )


def _read_switches(text: str, switches: str) -> dict[str, bool]:
    if switches in _SWITCHES:
        return dict.fromkeys(("forward", "backward"), _SWITCHES[switches])
    found: dict[str, bool] = {}
    for word in switches.split(","):
        name, _, value = word.partition("=")
        if name not in ("forward", "backward") or value not in _SWITCHES or name in found:
            raise RunError(f"{text!r} is no phase, {word!r} is no switch: {_SYNTAX}, for example 82%:forward=off.")
        found[name] = _SWITCHES[value]
    return found
