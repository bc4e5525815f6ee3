# SPDX-License-Identifier: Apache-2.0
"""Optimizers: pure update rules times state codecs."""

from lowbits.optim._adafactor import Adafactor
from lowbits.optim._adagrad import Adagrad
from lowbits.optim._adamw import Adam, AdamW, adam_update, adamw_update
from lowbits.optim._ademamix import AdEMAMix
from lowbits.optim._blockwise import Blockwise
from lowbits.optim._clipping import Clip, GlobalNorm, Percentile
from lowbits.optim._codec import Exact, Quantized, StateCodec
from lowbits.optim._factored import Factored
from lowbits.optim._few_bits import (
    Adafactor8bit,
    Adagrad8bit,
    Adam4bit,
    Adam8bit,
    AdamFp8,
    AdamW4bit,
    AdamW8bit,
    AdamWFp8,
    AdEMAMix8bit,
    LAMB8bit,
    LARS8bit,
    Lion8bit,
    RMSprop8bit,
    SGD8bit,
)
from lowbits.optim._groups import embeddings_in_32_bits, param_groups
from lowbits.optim._in_backward import StepInBackward, step_in_backward
from lowbits.optim._interchange import to_torch_state_dict
from lowbits.optim._lamb import LAMB
from lowbits.optim._lars import LARS
from lowbits.optim._lion import Lion
from lowbits.optim._optimizer import CodecOptimizer, Options
from lowbits.optim._report import MomentReport, StateReport, state_report
from lowbits.optim._rmsprop import RMSprop
from lowbits.optim._rule import Rule
from lowbits.optim._sgd import SGD

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "AdEMAMix",
    "AdEMAMix8bit",
    "Adafactor",
    "Adafactor8bit",
    "Adagrad",
    "Adagrad8bit",
    "Adam",
    "Adam4bit",
    "Adam8bit",
    "AdamFp8",
    "AdamW",
    "AdamW4bit",
    "AdamW8bit",
    "AdamWFp8",
    "Blockwise",
    "Clip",
    "CodecOptimizer",
    "Exact",
    "Factored",
    "GlobalNorm",
    "LAMB8bit",
    "LARS8bit",
    "Lion",
    "Lion8bit",
    "MomentReport",
    "Options",
    "Percentile",
    "Quantized",
    "RMSprop",
    "RMSprop8bit",
    "Rule",
    "SGD8bit",
    "StateCodec",
    "StateReport",
    "StepInBackward",
    "adam_update",
    "adamw_update",
    "embeddings_in_32_bits",
    "param_groups",
    "state_report",
    "step_in_backward",
    "to_torch_state_dict",
]
