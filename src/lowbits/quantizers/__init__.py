# SPDX-License-Identifier: Apache-2.0
"""How a tensor becomes few bits: granularity, scale rule, rounding, noise, transform."""

from lowbits.quantizers._block_scales import BlockRounding, Microscaling, Order, SharedExponent, TwoLevel
from lowbits.quantizers._granularity import Granularity, PerBlock, PerColumn, PerGroup, PerRow, PerTensor, PerTile
from lowbits.quantizers._noise import Noise, philox
from lowbits.quantizers._qtensor import PackedTensor, QTensor, QuantSpec, Rounding, ScaleRule, quantize
from lowbits.quantizers._scale import AbsMean, Amax, Asymmetric, PowerOfTwo, ReciprocalAmax, Scales, StudyAsymmetric
from lowbits.quantizers._transform import NVFP4_SIGNS, Hadamard

__all__ = [
    "NVFP4_SIGNS",
    "AbsMean",
    "Amax",
    "Asymmetric",
    "BlockRounding",
    "Granularity",
    "Hadamard",
    "Microscaling",
    "Noise",
    "Order",
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
    "ReciprocalAmax",
    "Rounding",
    "ScaleRule",
    "Scales",
    "SharedExponent",
    "StudyAsymmetric",
    "TwoLevel",
    "philox",
    "quantize",
]
