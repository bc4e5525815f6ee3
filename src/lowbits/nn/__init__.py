# SPDX-License-Identifier: Apache-2.0
"""Recipes, and linear layers that follow them."""

from lowbits.kernels import Execution
from lowbits.nn._convert import Choose, Conversion, convert_, high_precision, quantized_layers, set_step_
from lowbits.nn._embedding import StableEmbedding, stable_embedding_
from lowbits.nn._linear import QuantizedConv1D, QuantizedLayer, QuantizedLinear
from lowbits.nn._recipe import Gemm, Recipe, Save

__all__ = [
    "Choose",
    "Conversion",
    "Execution",
    "Gemm",
    "QuantizedConv1D",
    "QuantizedLayer",
    "QuantizedLinear",
    "Recipe",
    "Save",
    "StableEmbedding",
    "convert_",
    "high_precision",
    "quantized_layers",
    "set_step_",
    "stable_embedding_",
]
