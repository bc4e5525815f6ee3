# SPDX-License-Identifier: Apache-2.0
"""Recipes, and linear layers that follow them."""

from lowbits.kernels import Execution
from lowbits.nn._convert import Choose, Conversion, convert_, high_precision, quantized_layers, set_phase_, set_step_
from lowbits.nn._embedding import StableEmbedding, stable_embedding_
from lowbits.nn._grid import Grid, Packing, Scaling, moved, rounded
from lowbits.nn._grid_linear import GridLinear, grid_linear_, store_parts_
from lowbits.nn._keep import Keep
from lowbits.nn._linear import QuantizedConv1D, QuantizedLayer, QuantizedLinear
from lowbits.nn._phase import Phase, check_phases, phase_at
from lowbits.nn._qparameter import QParameter
from lowbits.nn._recipe import Gemm, Recipe, Save
from lowbits.nn._saved import listening_to_saved
from lowbits.nn._steps_of_weights import StepInit, StepRule, normal_parameter, normal_values, quantize_parameter
from lowbits.nn._sub_norm import sub_norm_
from lowbits.nn._weight_copies import weights_quantized_once
from lowbits.nn._weight_view import WeightView

__all__ = [
    "Choose",
    "Conversion",
    "Execution",
    "Gemm",
    "Grid",
    "GridLinear",
    "Keep",
    "Packing",
    "Phase",
    "QParameter",
    "QuantizedConv1D",
    "QuantizedLayer",
    "QuantizedLinear",
    "Recipe",
    "Save",
    "Scaling",
    "StableEmbedding",
    "StepInit",
    "StepRule",
    "WeightView",
    "check_phases",
    "convert_",
    "grid_linear_",
    "high_precision",
    "listening_to_saved",
    "moved",
    "normal_parameter",
    "normal_values",
    "phase_at",
    "quantize_parameter",
    "quantized_layers",
    "rounded",
    "set_phase_",
    "set_step_",
    "stable_embedding_",
    "store_parts_",
    "sub_norm_",
    "weights_quantized_once",
]
