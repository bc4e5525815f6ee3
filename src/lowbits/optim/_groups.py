# SPDX-License-Identifier: Apache-2.0
"""Sort a model's parameters into groups: decay on matrices only, the recipe's codecs, and what you choose."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lowbits.errors import SpecError
from lowbits.nn import QuantizedConv1D, QuantizedLayer, quantized_layers
from lowbits.optim._blockwise import Blockwise
from lowbits.optim._codec import Quantized, StateCodec
from lowbits.quantizers import PerBlock, QuantSpec, Rounding

Choose = Callable[[str, nn.Module, nn.Parameter], Mapping[str, Any] | None]
"""`(name of the parameter, module that owns it, parameter) -> arguments of the optimizer for it alone, or None`."""


def param_groups(model: nn.Module, weight_decay: float, choose: Choose | None = None) -> list[dict[str, Any]]:
    """Return parameter groups for any optimizer here.

    Embeddings and weights of linear layers decay; norms and biases do not. The moments of a converted layer's weight
    are stored as its recipe says; what no recipe names is stored as the optimizer's own arguments say.

    Args:
        model: after `convert_`, and after `fully_shard` where that is used.
        weight_decay: for the groups that decay.
        choose: overrides any argument (`lr`, `betas`, `weight_decay`, `min_8bit_size`, the codec of a moment, ...). It
            is asked for every name that a tied parameter has.
    Returns:
        Groups with `params`, `weight_decay` and overrides; each trainable parameter once, in the model's order.
    Raises:
        SpecError: `choose` wants one tied parameter in two ways.

    >>> groups = param_groups(nn.Linear(4, 2), 0.1, lambda name, *_: {"lr": 1e-4} if name == "bias" else None)
    >>> [{k: v for k, v in group.items() if k != "params"} for group in groups]
    [{'weight_decay': 0.1}, {'weight_decay': 0.0, 'lr': 0.0001}]
    """
    # The parameter itself: a method may let the layer see its weight through a function (`layer.weight` is the result).
    codecs = {id(layer._parameters["weight"]): _codecs(layer) for layer in quantized_layers(model).values()}
    chosen = _choices(model, choose) if choose else {}
    groups: dict[str, dict[str, Any]] = {}
    for parameter in model.parameters():  # tied parameters come once
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim >= 2 else 0.0
            _, extra = chosen.get(id(parameter), ("", {}))
            arguments = {"weight_decay": decay, **codecs.get(id(parameter), {}), **extra}
            groups.setdefault(repr(sorted(arguments.items())), {"params": [], **arguments})["params"].append(parameter)
    return list(groups.values())


def embeddings_in_32_bits(name: str, module: nn.Module, parameter: nn.Parameter) -> dict[str, Any] | None:
    """Choose float32 moments for the weights of `nn.Embedding`, as the 8-bit paper does (arXiv:2110.02861, sec. 2.3).

    Args:
        name: of the parameter.
        module: that owns it.
        parameter: itself.
    Returns:
        Overrides for `param_groups`; None for other parameters.
    """
    return {"min_8bit_size": math.inf} if isinstance(module, nn.Embedding) and parameter.ndim == 2 else None


def _choices(model: nn.Module, choose: Choose) -> dict[int, tuple[str, Mapping[str, Any]]]:
    """What `choose` says of each parameter, with the name by which it was asked."""
    chosen: dict[int, tuple[str, Mapping[str, Any]]] = {}
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(path, recurse=False):
            answer = choose(key, module, parameter)
            if answer is None:
                continue
            other, before = chosen.setdefault(id(parameter), (key, answer))
            if repr(sorted(before.items())) != repr(sorted(answer.items())):
                raise SpecError(
                    f"param_groups: {other} and {key} are one tied parameter, but `choose` returned {before} and "
                    f"{answer} for them. Return the same, or None, for one of them."
                )
    return chosen


def _codecs(layer: QuantizedLayer) -> dict[str, StateCodec]:
    specs = {"first": layer.recipe.first_moment, "second": layer.recipe.second_moment}
    return {moment: _codec(spec, layer) for moment, spec in specs.items() if spec is not None}


def _codec(spec: QuantSpec, layer: QuantizedLayer) -> StateCodec:
    if isinstance(spec.granularity, PerBlock) and spec.rounding is Rounding.NEAREST:
        return Blockwise(spec.format, spec.granularity.size)
    return Quantized(spec, transposed=isinstance(layer, QuantizedConv1D))
