# SPDX-License-Identifier: Apache-2.0
"""Moments after one step are known: m = (1 - b1) g, v = (1 - b2) g^2."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowbits.analysis import moment_errors, tensor_errors
from lowbits.formats import INT4, INT8, UINT8_NO_ZERO
from lowbits.nn import convert_
from lowbits.optim import AdamW, param_groups
from lowbits.quantizers import PerRow, QuantSpec
from lowbits.recipes import named


@pytest.mark.parametrize("recipe", ["bf16", "m8_channel"])
def test_errors_of_moments_after_one_step(recipe: str) -> None:
    model = nn.Sequential(nn.Linear(16, 12), nn.LayerNorm(12), Conv1D(20, 12))
    model[2].weight.data.mul_(30)
    convert_(model, named(recipe) if recipe != "bf16" else lambda n, m: named(recipe), verbose=False)
    optimizer = AdamW(param_groups(model, 0.1))
    model(torch.randn(9, 16)).square().sum().backward()
    gradients = {f"{i}.weight": model[i].weight.grad.clone() for i in (0, 2)}
    optimizer.step()
    first, second = QuantSpec(INT4, PerRow()), QuantSpec(INT8, PerRow())
    found = moment_errors(model, optimizer, first, second)
    assert list(found) == ["0.weight", "2.weight"]
    for name, g in gradients.items():
        rows = g if name == "0.weight" else g.t()  # Conv1D stores [in, out]
        assert found[name]["second"].zero == pytest.approx(tensor_errors(rows**2, second).zero, abs=1e-3)
        if recipe == "bf16":  # m8 has rounded m already
            assert found[name]["first"].sqnr_db == pytest.approx(tensor_errors(rows, first).sqnr_db, abs=1e-3)
    no_zero = moment_errors(model, optimizer, second=QuantSpec(UINT8_NO_ZERO, PerRow()))
    assert [list(row) for row in no_zero.values()] == [["second"], ["second"]]
    assert all(row["second"].zero == 0.0 for row in no_zero.values())


def test_before_the_first_step_there_is_nothing() -> None:
    model = nn.Linear(4, 4)
    assert moment_errors(model, AdamW(model.parameters()), QuantSpec(INT8)) == {}
