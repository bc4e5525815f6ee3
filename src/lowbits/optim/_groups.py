# SPDX-License-Identifier: Apache-2.0
"""Sort a model's parameters into groups: decay on matrices only, and the recipe's codecs on converted weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from lowbits.nn import QuantizedConv1D, quantized_layers
from lowbits.optim._blockwise import Blockwise
from lowbits.optim._codec import Exact, Quantized, StateCodec
from lowbits.quantizers import PerBlock, QuantSpec, Rounding


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW groups for a (converted) model.

    Embeddings and weights of linear layers decay; norms and biases do not. The moments of a converted layer's weight
    are stored as its recipe says; everything else keeps float32 moments, as in the linear-quantization study.

    Args:
        model: after `convert_`.
        weight_decay: for the groups that decay.
    Returns:
        Groups with `params`, `weight_decay`, `first`, `second`; each trainable parameter once, in the model's order.
    """
    codecs = {
        id(layer.weight): tuple(_codec(s, layer) for s in (layer.recipe.first_moment, layer.recipe.second_moment))
        for layer in quantized_layers(model).values()
    }
    groups: dict[tuple[float, Any], list[nn.Parameter]] = {}
    for parameter in model.parameters():  # tied parameters come once
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((decay, codecs.get(id(parameter), (Exact(), Exact()))), []).append(parameter)
    return [
        {"params": params, "weight_decay": decay, "first": first, "second": second}
        for (decay, (first, second)), params in groups.items()
    ]


def _codec(spec: QuantSpec | None, layer: nn.Module) -> StateCodec:
    if spec is not None and isinstance(spec.granularity, PerBlock) and spec.rounding is Rounding.NEAREST:
        return Blockwise(spec.format, spec.granularity.size)
    return Exact() if spec is None else Quantized(spec, transposed=isinstance(layer, QuantizedConv1D))
