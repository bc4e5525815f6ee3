# SPDX-License-Identifier: Apache-2.0
"""BitNet b1.58: the architecture and the hyper-parameters around `recipes.named("bitnet_b158")`.

Ma et al. 2024, "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits", arXiv:2402.17764. A BitLinear is a
linear layer under that recipe: int8 activations by token times ternary weights by tensor, straight-through gradients to
a float master. RMSNorms stand before it: the block's own before q, k, v, gate and up, and a sub-norm before each layer
that writes into the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lowbits.methods._contract import Method
from lowbits.nn import sub_norm_

__all__ = ["HYPER", "BitNet", "Hyper", "example"]

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


@dataclass(frozen=True)
class BitNet(Method):
    """Train BitNet b1.58: with `--recipe bitnet_b158`, whose layers the recipe makes.

    Args:
        norm_eps: of the sub-norms.
    """

    norm_eps: float = 1e-5

    def prepare_(self, model: nn.Module, seed: int) -> None:
        """See `Method.prepare_`."""
        sub_norm_(model, WRITERS, self.norm_eps)


def example() -> BitNet:
    """Return a method that trains a tiny GPT-2 within seconds."""
    return BitNet()
