# SPDX-License-Identifier: Apache-2.0
"""BitNet b1.58: the architecture and the hyper-parameters around `recipes.named("bitnet_b158")`.

Ma et al. 2024, "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits", arXiv:2402.17764. A BitLinear is a
linear layer under that recipe: int8 activations by token times ternary weights by tensor, straight-through gradients to
a float master. RMSNorms stand before it: the block's own before q, k, v, gate and up, and a sub-norm before each layer
that writes into the residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import nn

from lowbits.methods._contract import Method, Position
from lowbits.nn import sub_norm_
from lowbits.optim import param_groups

__all__ = ["HYPER", "BitNet", "Hyper", "Published", "example"]

WRITERS = ("o_proj", "down_proj", "c_proj")


@dataclass(frozen=True)
class Hyper:
    """Published hyper-parameters of AdamW.

    The learning rate falls from its peak; at half of the run (`second_stage`) it and the decay are exchanged.

    Args:
        lr: peak.
        second_lr: peak of the second half; equal to `lr` where there is one stage.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: in the first half.
        second_weight_decay: in the second half.
        warmup: steps.
        source: who published them.
    """

    lr: float
    second_lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    second_weight_decay: float
    warmup: int
    source: str

    def at(self, step: int, steps: int) -> tuple[float, float]:
        """Return the peak of the learning rate, before warm-up and decay over the run, and the weight decay.

        Args:
            step: index of the update.
            steps: number of updates in the run.
        """
        if 2 * step < steps:
            return self.lr, self.weight_decay
        return self.second_lr, self.second_weight_decay


HYPER: dict[str, Hyper] = {
    "dqt": Hyper(5e-4, 5e-4, (0.9, 0.999), 1e-6, 0.01, 0.01, 2000, "KYuuto1006/DQT, train.py: for all its runs"),
    "official-700m": Hyper(1.5e-3, 1e-3, (0.9, 0.95), 1e-8, 0.1, 0.0, 375, "Microsoft, training tips, 700M"),
    "official-3b": Hyper(1.2e-3, 8e-4, (0.9, 0.95), 1e-8, 0.1, 0.0, 375, "Microsoft, training tips, 1.3B to 3.9B"),
}
"""Published sets by name. The tips do not give eps; torch's default stands there."""


class Published(Enum):
    """Whose hyper-parameters a run has: its own options, or a set of `HYPER`."""

    NONE = "none"
    DQT = "dqt"
    OFFICIAL_700M = "official-700m"
    OFFICIAL_3B = "official-3b"


@dataclass(frozen=True)
class BitNet(Method):
    """Train BitNet b1.58: with `--recipe bitnet_b158`, whose layers the recipe makes.

    Args:
        hyper: learning rates, betas, eps and decay of a published set, in place of the run's; warm-up and decay of the
            learning rate remain the run's (`Hyper.warmup` is the published one). Norms and biases do not decay.
        norm_eps: of the sub-norms.
    """

    hyper: Published = Published.NONE
    norm_eps: float = 1e-5

    def prepare_(self, model: nn.Module, seed: int) -> None:
        """See `Method.prepare_`."""
        sub_norm_(model, WRITERS, self.norm_eps)

    def param_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """See `Method.param_groups`."""
        found = HYPER.get(self.hyper.value)
        if found is None:
            return param_groups(model, weight_decay)
        own = {"lr": found.lr, "betas": found.betas, "eps": found.eps}
        return param_groups(model, found.weight_decay, lambda *_: own)

    def before_update_(self, groups: Sequence[dict[str, Any]], at: Position) -> None:
        """See `Method.before_update_`: the second stage has another peak, and another decay where there is any."""
        found = HYPER.get(self.hyper.value)
        if found is not None:
            peak, decay = found.at(at.step, at.steps)
            for group in groups:
                group["lr"] *= peak / found.lr
                group["weight_decay"] = decay if group["weight_decay"] else 0.0


def example() -> BitNet:
    """Return a method that trains a tiny GPT-2 within seconds."""
    return BitNet()
