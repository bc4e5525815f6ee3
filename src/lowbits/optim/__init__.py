# SPDX-License-Identifier: Apache-2.0
"""Optimizers: pure update rules times state codecs."""

from lowbits.optim._adamw import AdamW, adamw_update
from lowbits.optim._codec import Exact, Quantized, StateCodec
from lowbits.optim._groups import param_groups

__all__ = ["AdamW", "Exact", "Quantized", "StateCodec", "adamw_update", "param_groups"]
