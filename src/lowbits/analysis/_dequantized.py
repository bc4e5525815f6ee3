# SPDX-License-Identifier: Apache-2.0
"""See a quantized model as an ordinary one whose weights happen to lie on a grid."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowbits.analysis._errors import quantize_once
from lowbits.nn import QuantizedConv1D, QuantizedLayer, high_precision, quantized_layers
from lowbits.quantizers import QuantSpec


@contextmanager
def dequantized(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block, put the converted weights on their grids and switch all quantizers off.

    The model that results has ordinary float arithmetic at the weights that its forward pass multiplied with; layers
    whose weights are not quantized keep theirs. A weight that is read in high precision elsewhere too (a tied
    embedding) is rounded for that reader as well.

    Args:
        model: converted or not; its weights are put back at the end, bit for bit.
    """
    layers = quantized_layers(model).values()
    rounded = [(layer, layer.weight.detach().clone()) for layer in layers if layer.active.fprop.rhs is not None]
    try:
        for layer, _ in rounded:
            layer.weight.data.copy_(weight_on_grid(layer, layer.active.fprop.rhs))
        with high_precision(model):
            yield model
    finally:
        for layer, origin in rounded:
            layer.weight.data.copy_(origin)


def weight_on_grid(layer: QuantizedLayer, spec: QuantSpec | None) -> Tensor:
    """Return the layer's weight as `spec` rounds it, in the parameter's own orientation and dtype.

    Args:
        layer: a converted layer.
        spec: how the weight `[out, in]` is quantized; None returns it as it is.
    """
    weight = layer.weight.detach()
    if spec is None:
        return weight
    transposed = isinstance(layer, QuantizedConv1D)
    with torch.no_grad():
        x_hat = quantize_once(weight.t() if transposed else weight, spec).dequantize()
    return (x_hat.t() if transposed else x_hat).to(weight.dtype)
