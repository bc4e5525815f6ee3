# SPDX-License-Identifier: Apache-2.0
"""Optimizers: pure update rules times state codecs."""

from lowbits.optim._adamw import Adam, AdamW, adam_update, adamw_update
from lowbits.optim._blockwise import Blockwise
from lowbits.optim._clipping import Clip, GlobalNorm, Percentile
from lowbits.optim._codec import Exact, Quantized, StateCodec
from lowbits.optim._groups import embeddings_in_32_bits, param_groups
from lowbits.optim._optimizer import CodecOptimizer, Options
from lowbits.optim._rule import Rule

__all__ = [
    "Adam",
    "AdamW",
    "Blockwise",
    "Clip",
    "CodecOptimizer",
    "Exact",
    "GlobalNorm",
    "Options",
    "Percentile",
    "Quantized",
    "Rule",
    "StateCodec",
    "adam_update",
    "adamw_update",
    "embeddings_in_32_bits",
    "param_groups",
]
