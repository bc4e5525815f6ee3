# SPDX-License-Identifier: Apache-2.0
"""Layers that few bits make slower are found; which they are depends on the machine, so the clock is a fake."""

from __future__ import annotations

import torch
from torch import nn

from lowbits.analysis import _native_gain, native_gains
from lowbits.nn import QuantizedLinear, Recipe, convert_
from lowbits.recipes import named


def test_one_of_each_shape_is_timed(monkeypatch) -> None:
    model = nn.ModuleDict({name: nn.Linear(*size) for name, size in {"a": (8, 4), "b": (8, 4), "c": (4, 8)}.items()})
    model["plain"] = nn.Linear(8, 8)
    convert_(model, lambda name, _: Recipe() if name == "plain" else named("int8_rowwise"), verbose=False)
    timed = []

    def seconds(layer: nn.Linear, tokens: int) -> float:
        assert tokens == 5
        timed.append((layer.in_features, isinstance(layer, QuantizedLinear)))
        return 2.0 if isinstance(layer, QuantizedLinear) and layer.in_features == 8 else 1.0

    monkeypatch.setattr(_native_gain, "_seconds", seconds)
    assert native_gains(model, 5) == {"a": 0.5, "b": 0.5, "c": 1.0}
    assert timed == [(8, False), (8, True), (4, False), (4, True)]


def test_a_layer_is_timed() -> None:
    model = nn.Sequential(nn.Linear(16, 32))
    convert_(model, named("int8_rowwise"), verbose=False)
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        assert native_gains(model, 7)["0"] > 0
    assert model[0].weight.grad is None and torch.equal(torch.get_rng_state(), state)


def test_simulated_layers_are_not_timed() -> None:
    model = nn.Sequential(nn.Linear(16, 32))
    convert_(model, named("w8a8"), verbose=False)
    assert native_gains(model, 7) == {}
