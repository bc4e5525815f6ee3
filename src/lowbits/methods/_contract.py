# SPDX-License-Identifier: Apache-2.0
"""What a paper may change in a training run beside its recipe.

`Method()` is ordinary training. A paper is one file with one frozen dataclass that overrides what it changes; the loop
calls these hooks and knows no method by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from lowbits.analysis import causal_loss
from lowbits.optim import param_groups


class Position(NamedTuple):
    """Where a run is.

    Args:
        step: index of the optimizer step, 0 for the first.
        steps: how many there will be.
        draw: number of this forward pass among all of the run, over micro-batches and processes; never repeats.
        lr: of this step's update, for groups without a peak of their own.
        share: of its peak that every learning rate has at this step.
    """

    step: int
    steps: int
    draw: int
    lr: float = 0.0
    share: float = 1.0


@dataclass(frozen=True)
class Table:
    """A table of the report: what a method found in a finished run.

    Args:
        title: above it.
        columns: heads; the first is of the column of names.
        rows: a name and a number, a text or nothing for each other column.
        note: one sentence below it: unit, and how to read it.
        shaded: the largest number, if the numbers are shares or levels of one scale and are to be shown as shades.
        drawing: an SVG to be shown above it, with styles of its own alone.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | None, ...], ...]
    note: str = ""
    shaded: float | None = None
    drawing: str = ""


@dataclass(frozen=True)
class Method:
    """Train as usual.

    Every field has a default and a plain value (a number, a text, an Enum): it is an option of the command line. What
    a method remembers between steps it keeps in parameters and buffers of the model, or in the optimizer's state: both
    are in every checkpoint.
    """

    @property
    def name(self) -> str:
        """The module of `lowbits.methods` that it is in; `none` for ordinary training, else where its class is."""
        package, _, own = type(self).__module__.partition("lowbits.methods.")
        if type(self) is Method:
            return "none"
        return f"{type(self).__module__}:{type(self).__name__}" if package else own.partition(".")[0]

    def prepare_(self, model: nn.Module, seed: int) -> None:
        """Change a model in place, after `convert_` and before optimizer, compilation and DDP.

        Args:
            model: on the CPU, in float32.
            seed: of the run; random bits are drawn with `Noise.of(seed, name, role)`.
        """

    def param_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """Return the parameter groups of the optimizer.

        A group's own `lr` is its peak: it follows the run's schedule like that of all others.

        Args:
            model: prepared.
            weight_decay: of the groups that decay.
        """
        return param_groups(model, weight_decay)

    def before_forward_(self, model: nn.Module, at: Position) -> None:
        """Set what changes with the position: counters of random bits, schedules.

        A pure function of the position: a batch may be run again, and an evaluation may come between.

        Args:
            model: prepared, not wrapped.
            at: of the forward pass that comes.
        """

    def loss(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Return the loss that is minimised.

        Args:
            model: prepared, perhaps wrapped by DDP.
            ids: int64 `[batch, length]`.
        """
        return causal_loss(model, ids)

    def before_update_(self, groups: Sequence[dict[str, Any]], at: Position) -> None:
        """Change the optimizer's groups for the update that comes: schedules of one's own.

        Args:
            groups: each has its learning rate by the run's schedule, anew in every step.
            at: of the last forward pass.
        """

    def after_step_(self, model: nn.Module, at: Position) -> None:
        """Change the model after an update: prune, anneal, project. Not called for a step that was skipped.

        Args:
            model: prepared, not wrapped.
            at: of the last forward pass of the step just taken.
        """

    def forms(self, model: nn.Module) -> dict[str, AbstractContextManager[object]]:
        """Return other forms of the model that are evaluated beside it: the log has their losses as `loss_NAME`.

        Args:
            model: prepared, not wrapped; within a context it has that form, and afterwards its own again.
        """
        return {}

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Return numbers for the log, measured now: each becomes a curve of the report.

        Args:
            model: prepared, not wrapped.
        """
        return {}

    def write(self, model: nn.Module, folder: Path) -> None:
        """Leave files of a finished run in its folder, beside its log: a smaller model, for example.

        Called before `tables`, and again where a run was killed before its end was noted.

        Args:
            model: prepared and trained, not wrapped; it is trained no more.
            folder: of the run.
        """

    def tables(self, model: nn.Module) -> tuple[Table, ...]:
        """Return what the report of a finished run shows beside its curves.

        Args:
            model: prepared and trained, not wrapped.
        """
        return ()
