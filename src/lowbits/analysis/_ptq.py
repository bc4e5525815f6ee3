# SPDX-License-Identifier: Apache-2.0
"""Quantize a finished model without training it again: what training under the quantizers has to beat.

Only the forward pass counts, so post-training quantization at given specs is the recipe `Recipe(fprop=Gemm(x, w))` in
evaluation: the same rounding, at the same places, as in training under that recipe. Scales are dynamic; nothing is
calibrated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from lowbits.analysis._evaluating import evaluating
from lowbits.nn import Recipe, convert_, high_precision, quantized_layers

Batch = TypeVar("Batch")
Result = TypeVar("Result")


@contextmanager
def post_training(model: nn.Module, recipe: Recipe) -> Iterator[nn.Module]:
    """Within the block, run the model's forward pass under another recipe.

    Args:
        model: plain or converted. Linear layers, the output head excepted, are converted if none is; a converted model
            keeps its choice of layers. The weights do not change, and the model is put back at the end: a plain model
            then holds converted layers in high precision, which compute what they did.
        recipe: only its `fprop` matters; it is followed whatever phase the model is in.
    Raises:
        ConversionError: the model has no linear layer.
        ShapeError: a group or tile does not divide a layer's size; raised by the forward pass, names the layer.
    """
    if not quantized_layers(model):
        convert_(model, Recipe(), verbose=False)
    layers = quantized_layers(model).values()
    before = [(layer.passes, layer.recipe) for layer in layers]
    try:
        for layer in layers:
            layer.passes, layer.recipe = (True, True), Recipe(fprop=recipe.fprop)
        with evaluating(model):
            yield model
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.passes, layer.recipe = own


def compare_post_training(
    model: nn.Module, recipes: Mapping[str, Recipe], evaluate: Callable[[nn.Module], Result]
) -> dict[str, Result]:
    """Evaluate a finished model in high precision and under several recipes.

    Args:
        model: as in `post_training`.
        recipes: by the name that the result carries; only their `fprop` matters.
        evaluate: for example `lambda m: perplexity(m, tokens)`.
    Returns:
        `high_precision` first, then one result a recipe, in order.
    """
    with high_precision(model), evaluating(model):
        results = {"high_precision": evaluate(model)}
    for name, recipe in recipes.items():
        with post_training(model, recipe):
            results[name] = evaluate(model)
    return results
