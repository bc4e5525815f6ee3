# SPDX-License-Identifier: Apache-2.0
"""Put noise on the weights of a model, number its draws, pull its bits."""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from lowbits.errors import SpecError
from lowbits.methods._contract import Position
from lowbits.methods._pseudo_noise._blocks import elements
from lowbits.methods._pseudo_noise._export import noisy_weights
from lowbits.methods._pseudo_noise._numerics import Plan
from lowbits.methods._pseudo_noise._weight import NoisyWeight
from lowbits.nn import quantized_layers
from lowbits.optim import param_groups


class Resample(Enum):
    """When new noise is drawn: for every micro-batch (of every process), or once an optimizer step."""

    MICRO = "micro"
    STEP = "step"


def number_of(at: Position, resample: Resample) -> int:
    """Return the number of the draw at a position."""
    return at.step if resample is Resample.STEP else at.draw


def add_noise_(model: nn.Module, plan: Plan, seed: int, *, lean: bool = False) -> None:
    """Let every converted layer see its weight through noise, in place.

    Parameters keep their names; `LAYER.weight_fn.b_i` comes to the state dict. Call it after `convert_`, before
    optimizer, `torch.compile` and DDP.

    Args:
        model: converted.
        plan: noise, blocks, bits, formats.
        seed: of the random bits.
        lean: draw the noisy weight again in the backward pass instead of keeping it: no extra memory, one more pass.
    Raises:
        SpecError: the model has no converted layer.
    """
    layers = quantized_layers(model)
    if not layers:
        raise SpecError("add_noise_: the model has no converted layer; call convert_(model, Recipe()) before.")
    for name, layer in layers.items():
        layer.weight_fn = NoisyWeight(layer.weight.shape, plan, seed=seed, name=name).to(layer.weight.device)
        layer.keep_weight = not lean


def noisy(model: nn.Module) -> list[NoisyWeight]:
    """Return the noise of every layer, for `set_draw_`."""
    return [weight for _, weight in noisy_weights(model).values()]


def bit_penalty(model: nn.Module, by_size: bool = False) -> Tensor:
    """Return sum over layers of the mean over blocks of |b_t - b_target|.

    Args:
        model: with noisy weights.
        by_size: weigh blocks by their elements and layers by their size, layers by 1 on average.
    """
    pairs = [(w, weight, weight.b_i) for w, weight in noisy_weights(model).values() if weight.b_i is not None]
    distances = [(b_i * weight.plan.span).abs() for _, weight, b_i in pairs]
    if not by_size:
        return torch.stack([d.mean() for d in distances]).sum()
    shares = [elements(w.shape, weight.plan.block, w.device) for w, weight, _ in pairs]
    total = sum(w.numel() for w, _, _ in pairs)
    return torch.stack([(d * s).sum() for d, s in zip(distances, shares, strict=True)]).sum() * (len(pairs) / total)


def bit_groups(model: nn.Module, weight_decay: float, pull: float, lr: float | None) -> list[dict[str, Any]]:
    """Return the usual parameter groups, and one of the bit-widths alone: their decay, and their learning rate."""

    def choose(name: str, module: nn.Module, parameter: nn.Parameter) -> dict[str, Any] | None:
        if not isinstance(module, NoisyWeight):
            return None
        # The name alone keeps them apart from norms and biases, which may have the same decay.
        return {"weight_decay": pull, "name": "bits"} | ({} if lr is None else {"lr": lr})

    return param_groups(model, weight_decay, choose)
