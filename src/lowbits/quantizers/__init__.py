# SPDX-License-Identifier: Apache-2.0
"""How a tensor becomes few bits: granularity, scale rule, rounding, noise, transform."""

from lowbits.quantizers._granularity import Granularity, PerBlock, PerColumn, PerGroup, PerRow, PerTensor, PerTile
from lowbits.quantizers._noise import Noise, philox
from lowbits.quantizers._qtensor import PackedTensor, QTensor, QuantSpec, Rounding, quantize
from lowbits.quantizers._scale import AbsMean, Amax, Asymmetric, PowerOfTwo, ScaleRule, StudyAsymmetric
from lowbits.quantizers._transform import Hadamard

__all__ = [
    "AbsMean",
    "Amax",
    "Asymmetric",
    "Granularity",
    "Hadamard",
    "Noise",
    "PackedTensor",
    "PerBlock",
    "PerColumn",
    "PerGroup",
    "PerRow",
    "PerTensor",
    "PerTile",
    "PowerOfTwo",
    "QTensor",
    "QuantSpec",
    "Rounding",
    "ScaleRule",
    "StudyAsymmetric",
    "philox",
    "quantize",
]
