# SPDX-License-Identifier: Apache-2.0
"""What a trained model loses when its linear layers are stored in few bits: the same blocks for every way to train."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from lowbits.methods.gaussws import Aggregate, Plan, PseudoNoise, Storage, add_noise_, ladder_, ladder_sizes, noisy
from lowbits.nn import quantized_layers

FORMATS = {"FP8 e4m3": Storage.E4M3, "FP6 e3m2": Storage.E3M2, "FP6 e2m3": Storage.E2M3, "FP4 e2m1": Storage.E2M1}
Evaluate = Callable[[nn.Module], float]


def cast_losses(model: nn.Module, evaluate: Evaluate) -> dict[str, float]:
    """Return the loss in bfloat16 and after a cast to each format, in blocks of 32 x 32 with a power-of-two scale.

    Args:
        model: trained; left as it is.
        evaluate: returns the validation loss of a model in evaluation mode.
    """
    losses = {}
    for name, storage in {"loss": Storage.NONE, **FORMATS}.items():
        other = copy.deepcopy(model)
        for layer in quantized_layers(other).values():
            layer.weight_fn = None
        add_noise_(other, Plan(noise=PseudoNoise.NONE, storage=storage), seed=0)
        losses[name] = evaluate(other.eval())
    return losses


def ladder_losses(model: nn.Module, evaluate: Evaluate) -> dict[str, float]:
    """Return the loss, and the bits a weight, of a model that is stored as its own bit-widths say.

    Args:
        model: trained with bit-widths; left as it is.
        evaluate: as above.
    """
    found: dict[str, float] = {}
    for aggregate in Aggregate:
        other = copy.deepcopy(model)
        weights = [weight.b_i for weight in noisy(other) if weight.b_i is not None]
        sizes = ladder_sizes(other, aggregate)
        total = sum(size.bytes for size in sizes) + sum(-(-b_i.numel() // 2) for b_i in weights)
        found[f"bits a weight, by {aggregate.value}"] = 8 * total / sum(size.weights for size in sizes)
        ladder_(other, aggregate)
        found[f"ladder by {aggregate.value}"] = evaluate(other.eval())
    return found
