# SPDX-License-Identifier: Apache-2.0
"""What holds for every optimizer with every way to store moments: it learns, stays finite, resumes bit for bit."""

from __future__ import annotations

import io
import itertools

import pytest
import torch
from torch import nn

from lowbits import optim
from lowbits.formats import (
    DYNAMIC4,
    DYNAMIC8,
    E4M3,
    E4M3_NO_UNDERFLOW,
    INT8,
    UDYNAMIC8,
    UINT8_NO_ZERO,
    ULINEAR4,
)
from lowbits.optim import Blockwise, Exact, Factored, Quantized
from lowbits.quantizers import PerRow, QuantSpec, Rounding

OPTIMIZERS = {
    "AdamW": {"lr": 0.1}, "Adam": {"lr": 0.1}, "SGD": {"lr": 0.1, "momentum": 0.5}, "RMSprop": {"lr": 0.05},
    "Adagrad": {"lr": 0.3}, "Lion": {"lr": 0.05}, "AdEMAMix": {"lr": 0.03, "t_alpha": 30, "t_beta3": 30},
    "LAMB": {"lr": 0.1}, "LARS": {"lr": 1.0, "trust_coefficient": 0.1, "momentum": 0.5},
    "Adafactor": {"lr": 0.3, "beta1": 0.5},
}  # fmt: skip
# How moments of both signs are stored, and how those without a sign.
CODECS = {
    "float32": (Exact(), Exact()),
    "bfloat16": (Exact(torch.bfloat16), Exact(torch.bfloat16)),
    "dynamic 8": (Blockwise(DYNAMIC8), Blockwise(UDYNAMIC8)),
    "dynamic 8, blocks of 64": (Blockwise(DYNAMIC8, 64), Blockwise(UDYNAMIC8, 64)),
    "linear 8": (Blockwise(INT8), Blockwise(UINT8_NO_ZERO)),
    "fp8": (Blockwise(E4M3), Blockwise(E4M3_NO_UNDERFLOW)),
    "4 bit": (Blockwise(DYNAMIC4, 128), Blockwise(ULINEAR4, 128)),
    "per tensor": (Quantized(QuantSpec(INT8)), Quantized(QuantSpec(UINT8_NO_ZERO))),
    "per row": (Quantized(QuantSpec(INT8, PerRow())), Quantized(QuantSpec(UINT8_NO_ZERO, PerRow()))),
    "stochastic": (Quantized(QuantSpec(INT8, rounding=Rounding.STOCHASTIC)), Exact()),
    "factored": (Exact(), Factored()),
}
SHAPES = [(7, 40), (257,), (2, 3, 5), (1,)]


def build(name, codec):
    kind = getattr(optim, name)
    parameters = [nn.Parameter(torch.linspace(0.5, 1.5, torch.Size(s).numel()).view(s)) for s in SHAPES]
    codecs = {moment: CODECS[codec][0 if signed else 1] for moment, signed in kind.rule.moments.items()}
    return parameters, kind(parameters, **OPTIMIZERS[name], **codecs)


def run(parameters, optimizer, steps):
    """Minimize |p|^2 / 2, whose gradient is p."""
    for _ in range(steps):
        for p in parameters:
            p.grad = p.detach().clone()
        optimizer.step()
    return sum(p.square().sum().item() for p in parameters)


@pytest.mark.parametrize(("name", "codec"), list(itertools.product(OPTIMIZERS, CODECS)))
def test_it_learns_and_resumes_bit_for_bit(name, codec):
    parameters, optimizer = build(name, codec)
    before = run(parameters, optimizer, 0)
    run(parameters, optimizer, 7)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    again, resumed = build(name, codec)
    for p, q in zip(again, parameters, strict=True):
        p.data.copy_(q.data)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert run(parameters, optimizer, 5) == run(again, resumed, 5) < 0.6 * before
    for p, q in zip(again, parameters, strict=True):
        one, other = resumed.state[p], optimizer.state[q]
        assert one.keys() == other.keys() and torch.equal(p, q)
        assert all(torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one)
