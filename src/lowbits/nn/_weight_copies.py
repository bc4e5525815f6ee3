# SPDX-License-Identifier: Apache-2.0
"""Quantize weights once for all the forward passes between two updates.

Each forward pass quantizes the weights anew, layer by layer, which keeps one copy of each for the backward pass. With
micro-batches, or blocks that are recomputed in the backward pass, the same weights are quantized several times; and on
a GPU the host is busy with many small launches. Kept copies are made together and take two bytes a weight for as long.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowbits.kernels import quantize_each
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
    before = [layer.copies for layer in layers]
    try:
        _keep_copies_(layers)
        yield
    finally:
        for layer, copies in zip(layers, before, strict=True):
            layer.copies = copies


def _keepable(layer: QuantizedLayer) -> bool:
    recipe = layer.recipe
    plain = type(layer.weight.data) is Tensor and layer.weight_fn is None and layer.active is recipe
    if not plain or recipe.fprop.rhs is None or recipe.dgrad.rhs is None:
        return False
    nearest = all(spec.rounding is Rounding.NEAREST for spec in (recipe.fprop.rhs, recipe.dgrad.rhs))
    return nearest and recipe.native(layer.weight.device)[:2] == (True, True)


@torch.no_grad()
def _keep_copies_(layers: Sequence[QuantizedLayer]) -> None:
    """Codes and scales of each weight as fprop and as dgrad multiplies it; those alike are made at once."""
    alike: dict[tuple[object, ...], list[QuantizedLayer]] = defaultdict(list)
    for layer in layers:
        turned, recipe = isinstance(layer, QuantizedConv1D), layer.recipe
        alike[turned, recipe.fprop.rhs, recipe.dgrad.rhs, layer.weight.dtype, layer.weight.device].append(layer)
    for group in alike.values():
        turned, recipe = isinstance(group[0], QuantizedConv1D), group[0].recipe
        # `Conv1D` stores W^T, whose copy along its rows is that of W along its columns.
        specs = (recipe.dgrad.rhs, recipe.fprop.rhs) if turned else (recipe.fprop.rhs, recipe.dgrad.rhs)
        for layer, made in zip(group, quantize_each([layer.weight.data for layer in group], *specs), strict=True):
            along_in, along_out = made[::-1] if turned else made
            assert along_in is not None and along_out is not None
            layer.copies = along_in.codes, along_in.scale, along_out.codes, along_out.scale
