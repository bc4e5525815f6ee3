# SPDX-License-Identifier: Apache-2.0
"""What a paper may change in a training run beside its recipe.

`Method()` is ordinary training. A paper is one file with one frozen dataclass that overrides what it changes; the loop
calls these hooks and knows no method by name.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    """

    step: int
    steps: int
    draw: int


@dataclass(frozen=True)
class Method:
    """Train as usual.

    What a method remembers between steps it keeps in parameters and buffers of the model, or in the optimizer's state:
    both are in every checkpoint.
    """

    def prepare_(self, model: nn.Module, seed: int) -> None:
        """Change a model in place, after `convert_` and before optimizer, compilation and DDP.

        Args:
            model: on the CPU, in float32.
            seed: of the run; random bits are drawn with `Noise.of(seed, name, role)`.
        """

    def param_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """Return the parameter groups of the optimizer.

        Args:
            model: prepared.
            weight_decay: of the groups that decay.
        """
        return param_groups(model, weight_decay)

    def before_forward_(self, model: nn.Module, at: Position) -> None:
        """Set what changes with the position: counters of random bits, schedules.

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

    def after_step_(self, model: nn.Module, at: Position) -> None:
        """Change the model after an update: prune, anneal, project.

        Args:
            model: prepared, not wrapped.
            at: of the step just taken.
        """

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Return numbers for the log, measured now.

        Args:
            model: prepared, not wrapped.
        """
        return {}
