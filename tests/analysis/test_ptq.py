# SPDX-License-Identifier: Apache-2.0
"""Post-training quantization computes the forward pass of a model under the recipe, and leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowbits.analysis import compare_post_training, post_training
from lowbits.errors import ShapeError
from lowbits.formats import INT4
from lowbits.nn import Gemm, Recipe, convert_
from lowbits.quantizers import AbsMean, PerGroup, PerRow, QuantSpec, quantize
from lowbits.recipes import named


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 8)).train()


def test_closed_form_of_one_layer() -> None:
    spec, x = QuantSpec(INT4, PerRow()), torch.randn(7, 32)
    layer = nn.Linear(32, 16)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    want = quantize(x, spec).dequantize() @ quantize(weight, spec).dequantize().t() + bias
    with post_training(nn.Sequential(layer), Recipe(fprop=Gemm(spec, spec))) as quantized:
        torch.testing.assert_close(quantized(x), want)


def test_results_and_restoration(model: nn.Sequential) -> None:
    x = torch.randn(5, 32)
    want = {"high_precision": model(x)}
    for name in ("w4_channel", "w8a8"):
        twin = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 8))
        twin.load_state_dict(model.state_dict())
        convert_(twin, named(name), verbose=False)
        want[name] = twin(x)
    recipes = {name: named(name) for name in ("w4_channel", "w8a8")}
    for _ in range(2):  # a plain model first, then a converted one
        found = compare_post_training(model, recipes, lambda m: m(x))
        assert list(found) == list(want)
        for name, y in want.items():
            torch.testing.assert_close(found[name], y, rtol=0, atol=1e-6)
        convert_(model, named("a8_token"), verbose=False)
    assert model.training and {layer.recipe for layer in (model[0], model[2])} == {named("a8_token")}


def test_zeros_that_would_count_name_the_layer(model: nn.Sequential) -> None:
    recipe = Recipe(fprop=Gemm(None, QuantSpec(INT4, PerGroup(32), AbsMean())))
    with pytest.raises(ShapeError, match="^2.*would count"), post_training(model, recipe) as quantized:
        quantized(torch.randn(2, 32))
    assert model[2].recipe == Recipe()
