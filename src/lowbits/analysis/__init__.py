# SPDX-License-Identifier: Apache-2.0
"""Instruments: what quantization does to tensors, to memory, to the loss landscape and to the finished model.

Each takes a model, a function `loss(model, batch) -> scalar` where one is needed, and batches; none knows of runs.
"""

from lowbits.analysis._dequantized import dequantized
from lowbits.analysis._errors import TensorErrors, error_sums, tensor_errors
from lowbits.analysis._evaluating import evaluating
from lowbits.analysis._fewshot import SEEDS, TASKS, Accuracy, fewshot
from lowbits.analysis._gradients import GradientSparsity, gradient_sparsity, magnitude_histogram, output_gradients
from lowbits.analysis._ledger import Ledger, Updating, linear_input_bytes, predict_memory
from lowbits.analysis._linears import linear_layers, output_axes
from lowbits.analysis._loss import causal_loss
from lowbits.analysis._memory import Bytes, Memory, measure_memory, measure_saved_bytes, weights_in_few_bits
from lowbits.analysis._moments import moment_errors
from lowbits.analysis._native_gain import native_gains
from lowbits.analysis._outliers import ChannelStatistics, describe_channels, input_channels, jaccard, overlaps
from lowbits.analysis._perplexity import Perplexity, perplexity, read_text, text_perplexity, windows
from lowbits.analysis._probe import LayerProbe, Whole, as_patterns, probe_layers, probe_model, propose_keep
from lowbits.analysis._provenance import device_name, provenance
from lowbits.analysis._ptq import compare_post_training, post_training
from lowbits.analysis._sharpness import Sharpness, m_sharpness
from lowbits.analysis._stored import stored_bytes
from lowbits.analysis._surface import Surface, filter_normalised_direction, heat_map, loss_surface
from lowbits.analysis._tape import Kind
from lowbits.analysis._time_share import Family, TimeShare, classify, family_of, linear_flops_share, time_share

__all__ = [
    "SEEDS",
    "TASKS",
    "Accuracy",
    "Bytes",
    "ChannelStatistics",
    "Family",
    "GradientSparsity",
    "Kind",
    "LayerProbe",
    "Ledger",
    "Memory",
    "Perplexity",
    "Sharpness",
    "Surface",
    "TensorErrors",
    "TimeShare",
    "Updating",
    "Whole",
    "as_patterns",
    "causal_loss",
    "classify",
    "compare_post_training",
    "dequantized",
    "describe_channels",
    "device_name",
    "error_sums",
    "evaluating",
    "family_of",
    "fewshot",
    "filter_normalised_direction",
    "gradient_sparsity",
    "heat_map",
    "input_channels",
    "jaccard",
    "linear_flops_share",
    "linear_input_bytes",
    "linear_layers",
    "loss_surface",
    "m_sharpness",
    "magnitude_histogram",
    "measure_memory",
    "measure_saved_bytes",
    "moment_errors",
    "native_gains",
    "output_axes",
    "output_gradients",
    "overlaps",
    "perplexity",
    "post_training",
    "predict_memory",
    "probe_layers",
    "probe_model",
    "propose_keep",
    "provenance",
    "read_text",
    "stored_bytes",
    "tensor_errors",
    "text_perplexity",
    "time_share",
    "weights_in_few_bits",
    "windows",
]
