# SPDX-License-Identifier: Apache-2.0
"""GETA: prune any network and quantize it in the same run (arXiv:2502.16638).

graph = geta.trace(model, (images,))                     # what can be cut, and what must be cut with it
geta.quantize_(model)                                    # a trained step, range and exponent for every weight
qasso = geta.Qasso(model, graph, geta.Target(0.5, 4, 8), geta.Schedule.of(steps))
qasso.attach(optimizer)                                  # the loop stays as it is
...
small = geta.construct(graph, model, qasso.keep)         # smaller tensors, integer weights
"""

from lowbits.methods.geta._construct import PackedWeight, SubNetwork, construct
from lowbits.methods.geta._cost import Cost, Work, cost, dense_cost
from lowbits.methods.geta._drawing import page, svg
from lowbits.methods.geta._graph import Dimension, Graph, Kept, Member, Treat, trace
from lowbits.methods.geta._layers import (
    QuantizedLayer,
    calibrate_,
    quantize_,
    quantized_layers,
    quantizers,
    weight_quantizers,
)
from lowbits.methods.geta._method import GETA, State, example, finished
from lowbits.methods.geta._onnx import save_onnx
from lowbits.methods.geta._qasso import Progress, Qasso
from lowbits.methods.geta._quantizer import Quantizer, Slope, bits_of, quantize, step_of
from lowbits.methods.geta._saliency import saliency
from lowbits.methods.geta._saving import load, save, save_pretrained
from lowbits.methods.geta._schedule import Moment, Schedule, Stage, Target

__all__ = [
    "GETA",
    "Cost",
    "Dimension",
    "Graph",
    "Kept",
    "Member",
    "Moment",
    "PackedWeight",
    "Progress",
    "Qasso",
    "QuantizedLayer",
    "Quantizer",
    "Schedule",
    "Slope",
    "Stage",
    "State",
    "SubNetwork",
    "Target",
    "Treat",
    "Work",
    "bits_of",
    "calibrate_",
    "construct",
    "cost",
    "dense_cost",
    "example",
    "finished",
    "load",
    "page",
    "quantize",
    "quantize_",
    "quantized_layers",
    "quantizers",
    "saliency",
    "save",
    "save_onnx",
    "save_pretrained",
    "step_of",
    "svg",
    "trace",
    "weight_quantizers",
]
