# SPDX-License-Identifier: Apache-2.0
"""Quantize weights once for all the forward passes between two updates.

Each forward pass quantizes the weights anew, which costs nothing to keep and little to do beside many tokens. With
micro-batches, or blocks that are recomputed in the backward pass, the same weights are quantized several times; kept
copies take two bytes a weight for as long.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowbits.kernels import quantize_both
from lowbits.nn._convert import quantized_layers
from lowbits.nn._linear import QuantizedConv1D, QuantizedLayer
from lowbits.quantizers import Rounding


@contextmanager
def weights_quantized_once(model: nn.Module) -> Iterator[None]:
    """Quantize the weights of natively run layers on entry, and take these copies for every pass within the block.

    The numbers are those without it, so nothing may change a weight within the block. Layers whose weights are rounded
    stochastically, go through a function, or are multiplied in high precision in one of fprop and dgrad quantize as
    always.

    Args:
        model: converted.
    """
    layers = [layer for layer in quantized_layers(model).values() if _keepable(layer)]
    try:
        for layer in layers:
            layer.copies = _copies(layer)
        yield
    finally:
        for layer in layers:
            layer.copies = None


def _keepable(layer: QuantizedLayer) -> bool:
    recipe = layer.recipe
    plain = type(layer.weight.data) is Tensor and layer.weight_fn is None
    if not plain or recipe.fprop.rhs is None or recipe.dgrad.rhs is None:
        return False
    nearest = all(spec.rounding is Rounding.NEAREST for spec in (recipe.fprop.rhs, recipe.dgrad.rhs))
    return nearest and recipe.native(layer.weight.device)[:2] == (True, True)


@torch.no_grad()
def _copies(layer: QuantizedLayer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales of the weight as fprop and as dgrad multiplies it."""
    weight = layer.weight.t() if isinstance(layer, QuantizedConv1D) else layer.weight
    along_in, along_out = quantize_both(weight, layer.recipe.fprop.rhs, layer.recipe.dgrad.rhs, None, None)
    assert along_in is not None and along_out is not None
    return along_in.codes, along_in.scale, along_out.codes, along_out.scale
