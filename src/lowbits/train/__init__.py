# SPDX-License-Identifier: Apache-2.0
"""Describe a run as data and carry it out.

result = train(Run(model="gpt2-nano", recipe="w8a8", steps=400), "runs/w8a8")
"""

from __future__ import annotations

from lowbits.train._checkpoint import checkpoints, newest_intact, verify
from lowbits.train._loop import train
from lowbits.train._run import (
    Autocast,
    Compute,
    Device,
    LayerChoice,
    ModelFactory,
    Optimizer,
    Run,
    Saving,
    Sink,
    Watching,
)
from lowbits.train._schedule import Curve, Schedule
from lowbits.train._state import load_model_

__all__ = [
    "Autocast",
    "Compute",
    "Curve",
    "Device",
    "LayerChoice",
    "ModelFactory",
    "Optimizer",
    "Run",
    "Saving",
    "Schedule",
    "Sink",
    "Watching",
    "checkpoints",
    "load_model_",
    "newest_intact",
    "train",
    "verify",
]
