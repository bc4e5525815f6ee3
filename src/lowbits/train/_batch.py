# SPDX-License-Identifier: Apache-2.0
"""Compute the loss of a micro-batch; every random stream of a run is set here from the position, and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lowbits.data import TokenData
from lowbits.methods import Position
from lowbits.nn import phase_at, set_phase_, set_step_
from lowbits.train._run import Autocast, Run
from lowbits.train._seeds import derived_seed
from lowbits.train._world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Batches:
    """The training batches of one process.

    Args:
        run: its seed, sizes and precision.
        data: the tokens.
        model: not wrapped; its layers count the noise.
        world: which part of each batch is this process's.
    """

    run: Run
    data: TokenData
    model: PreTrainedModel
    world: World

    def loss(self, network: nn.Module, step: int, micro: int = 0) -> Tensor:
        """Return the loss of one micro-batch, a pure function of weights and position.

        All micro-batches of all processes are numbered in one row, so that two processes see the tokens and draw the
        noise of one process with twice the micro-batches.

        Args:
            network: the model, or what wraps it.
            step: index of the update, 0 for the first.
            micro: index of the micro-batch in it.
        """
        run, here = self.run, self.world
        index = step * run.accumulation + micro
        ids = self.data.batch(
            "train",
            index,
            batch_size=run.batch_size // run.accumulation,
            block=run.block,
            seed=run.seed,
            rank=here.rank,
            world=here.size,
        )
        torch.manual_seed(derived_seed(run.seed, "dropout", index, here.rank))
        at = self.at(step, micro)
        set_step_(self.model, at.draw)
        if run.phases:
            phase = phase_at(run.phases, step, run.steps)
            set_phase_(self.model, forward=phase.forward, backward=phase.backward)
        run.method.before_forward_(self.model, at)
        with autocast(run, here):
            return run.method.loss(network, ids.to(here.device, non_blocking=True))

    def at(self, step: int, micro: int) -> Position:
        """Return the position of a micro-batch of this process."""
        draw = (step * self.run.accumulation + micro) * self.world.size + self.world.rank
        share = self.run.schedule.factor(step, self.run.steps)
        return Position(step, self.run.steps, draw, self.run.optimizer.lr * share, share)

    def rehearse(self) -> None:
        """Run a micro-batch of every phase forward and backward without compilation, and forget it.

        What cannot work (a group that does not divide the tokens, too little memory) is said in plain words before
        anything is written; and formats fill their caches, whose lock the compiler cannot trace on Python 3.11.
        """
        with torch.compiler.set_stance("force_eager"):
            for step in sorted({0, *(phase.first_step(self.run.steps) for phase in self.run.phases)}):
                self.loss(self.model, step).backward()
        self.model.zero_grad(set_to_none=True)


def autocast(run: Run, world: World) -> torch.autocast:
    """Return the precision context of a run's forward pass."""
    return torch.autocast(world.device.type, torch.bfloat16, enabled=run.compute.autocast is Autocast.BF16)
