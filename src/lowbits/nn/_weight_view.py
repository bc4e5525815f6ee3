# SPDX-License-Identifier: Apache-2.0
"""A function through which any layer sees its weight; see `lowbits.methods.distillation.quantize_weights_`."""

from __future__ import annotations

from torch import nn


class WeightView(nn.Module):
    """A function of a weight, kept as a child of the layer; `high_precision` switches it off.

    Attributes:
        off: whether the layer sees the parameter itself.
    """

    off: bool = False
