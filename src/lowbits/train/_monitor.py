# SPDX-License-Identifier: Apache-2.0
"""Measure, layer by layer, what the recipe does to weights, inputs and output gradients of a real batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lowbits.analysis import TensorErrors, tensor_errors
from lowbits.nn import QuantizedConv1D, QuantizedLayer, Recipe, quantized_layers
from lowbits.quantizers import QuantSpec

Errors = dict[str, dict[str, float | None]]
_View = tuple[Tensor, QuantSpec | None]


def layer_errors(model: nn.Module, loss_of_batch: Callable[[], Tensor]) -> dict[str, Errors]:
    """Run a batch forward and backward, and return the errors of every operand that is quantized.

    An operand that is quantized more than once (in two GEMMs, or in parts) is reported by its worst SQNR.

    Args:
        model: converted, not wrapped; its gradients are overwritten.
        loss_of_batch: runs the forward pass and returns the loss.
    Returns:
        Layer -> `input`, `weight`, `grad` -> numbers of `lowbits.analysis.TensorErrors`; an operand in high
        precision has none.
    """
    layers = quantized_layers(model)
    report: dict[str, Errors] = {name: {"input": {}, "weight": {}, "grad": {}} for name in layers}
    handles = [layer.register_forward_hook(_measure(report[name])) for name, layer in layers.items()]
    model.zero_grad(set_to_none=True)
    try:
        # Compiled blocks would not call the hooks.
        with torch.compiler.set_stance("force_eager"):
            loss_of_batch().backward()
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    return report


def _measure(errors: Errors) -> Callable[[QuantizedLayer, tuple[Tensor, ...], Tensor], None]:
    def hook(layer: QuantizedLayer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        recipe = layer.recipe
        x = inputs[0].detach().flatten(0, -2)
        w = layer.weight.detach()
        w = w.t() if isinstance(layer, QuantizedConv1D) else w
        errors["input"] = _worst([(x, recipe.fprop.lhs), (x.t(), recipe.wgrad.rhs)])
        errors["weight"] = _worst([(w, recipe.fprop.rhs), (w.t(), recipe.dgrad.rhs)])
        if output.requires_grad:
            output.register_hook(lambda g: errors.update(grad=_worst(_gradients(g.detach().flatten(0, -2), recipe))))

    return hook


def _gradients(g: Tensor, recipe: Recipe) -> list[_View]:
    parts = g.chunk(recipe.grad_parts, -1)
    return [(part, recipe.dgrad.lhs) for part in parts] + [(part.t(), recipe.wgrad.lhs) for part in parts]


def _worst(views: Iterable[_View]) -> dict[str, float | None]:
    measured: list[TensorErrors] = [tensor_errors(x, spec) for x, spec in views if spec is not None]
    return min(measured, key=lambda errors: errors.sqnr_db).as_json() if measured else {}
