# SPDX-License-Identifier: Apache-2.0
"""Every optimizer with float32 moments against its paper in float64, and against torch where it has the optimizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lowbits import optim
from lowbits.errors import SpecError
from tests.oracles import optimizers as papers

STEPS = 50
ADAM = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
MIX = {**ADAM, "betas": (0.9, 0.99, 0.999), "alpha": 5.0, "t_alpha": None, "t_beta3": None}
FACTOR = {"lr": 1e-2, "beta2_decay": -0.8, "eps": (1e-7, 1e-3), "d": 1.0, "weight_decay": 0.1}
GRAD = {"lr": 3e-2, "lr_decay": 0.0, "weight_decay": 0.1, "initial_accumulator_value": 0.0, "eps": 1e-10}
# name: optimizer, hyper-parameters
CASES = {
    "adamw": ("AdamW", ADAM),
    "adam": ("Adam", ADAM),
    "sgd": ("SGD", {"lr": 3e-2, "weight_decay": 0.1}),
    "sgd maximize": ("SGD", {"lr": 3e-2, "weight_decay": 0.1, "maximize": True}),
    "momentum": ("SGD", {"lr": 3e-3, "momentum": 0.9, "weight_decay": 0.1}),
    "dampening": ("SGD", {"lr": 3e-3, "momentum": 0.9, "dampening": 0.5}),
    "nesterov": ("SGD", {"lr": 3e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "rmsprop": ("RMSprop", {"lr": 3e-3, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0.1}),
    "adagrad": ("Adagrad", GRAD),
    "adagrad decay": ("Adagrad", {**GRAD, "lr_decay": 0.1, "initial_accumulator_value": 0.1}),
    "lion": ("Lion", {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}),
    "ademamix": ("AdEMAMix", MIX),
    "ademamix scheduled": ("AdEMAMix", {**MIX, "t_alpha": 40, "t_beta3": 30}),
    "lamb": ("LAMB", ADAM),
    "lars": ("LARS", {"lr": 1.0, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 1e-2}),
    "adafactor": ("Adafactor", FACTOR),
    "adafactor momentum": ("Adafactor", {**FACTOR, "beta1": 0.9}),
}
SHAPES = [(6, 10), (7,), (2, 3, 4)]
TORCH = [name for name, (kind, hyper) in CASES.items() if hasattr(torch.optim, kind) and "beta1" not in hyper]
# 50 steps, each off by some float32 roundings of parameters of up to 1 and of steps of up to 0.05 that a few operations
# on moments precede: 50 * (4 * 2^-24 + 0.05 * 16 * 2^-24).
BOUND = STEPS * (4 + 0.05 * 16) * 2**-24


def start(shape):
    return torch.linspace(-1, 1, int(np.prod(shape))).view(shape)


def gradients(shape, steps=STEPS):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) * 0.1 for _ in range(steps)]


def train(optimizer_class, hyper, shape):
    p = nn.Parameter(start(shape))
    optimizer = optimizer_class([p], **hyper)
    for g in gradients(shape):
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_float32_moments_follow_the_paper(name, shape):
    kind, hyper = CASES[name]
    p, s = start(shape).double().numpy(), {}
    for t, g in enumerate(gradients(shape), 1):
        p = getattr(papers, kind.lower())(p, g.double().numpy(), s, t, **hyper)
    np.testing.assert_allclose(train(getattr(optim, kind), hyper, shape).numpy(), p, rtol=0, atol=BOUND)
    assert np.abs(p - start(shape).numpy()).max() > 100 * BOUND


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", TORCH)
def test_float32_moments_agree_with_torch(name, shape):
    kind, hyper = CASES[name]
    ours, theirs = train(getattr(optim, kind), hyper, shape), train(getattr(torch.optim, kind), hyper, shape)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=BOUND)


def test_sgd_without_momentum_stores_nothing_and_groups_choose():
    a, b = (nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = optim.SGD([{"params": [a]}, {"params": [b], "momentum": 0.9}], lr=0.1)
    for _ in range(2):
        a.grad, b.grad = torch.ones(4), torch.ones(4)
        optimizer.step()
    assert set(optimizer.state[a]) == {"step"} and set(optimizer.state[b]) == {"step", "first.value"}
    torch.testing.assert_close(torch.stack([a, b]).detach(), torch.tensor([[0.8] * 4, [1 - 0.1 - 0.19] * 4]))


@pytest.mark.parametrize("kind", ["LAMB", "LARS"])
def test_a_trust_ratio_works_in_both_directions_and_lets_zeros_leave(kind):
    """The step is lr times the tensor's length, for gradients of any length: bitsandbytes' only shortens."""
    hyper = {"momentum": 0.0, "trust_coefficient": 1.0} if kind == "LARS" else {"eps": 1e-30}
    for weight, gradient in [(1.0, 1e-6), (1.0, 1e6), (1e-3, 1.0), (1e3, 1e-25)]:
        p = nn.Parameter(weight * torch.ones(10))
        optimizer = getattr(optim, kind)([p], lr=0.1, weight_decay=0.0, **hyper)
        p.grad = gradient * torch.ones(10)
        optimizer.step()
        torch.testing.assert_close(p.detach(), 0.9 * weight * torch.ones(10), rtol=1e-6, atol=0)
    p = nn.Parameter(torch.zeros(10))
    p.grad = torch.ones(10)
    getattr(optim, kind)([p], lr=0.1, weight_decay=0.0, **hyper).step()
    torch.testing.assert_close(p.detach(), -0.1 * torch.ones(10))


def test_factored_moments_serve_any_rule():
    """On gradients whose squares are of rank one, AdamW with a factored second moment is AdamW."""
    rows, columns = torch.linspace(0.5, 2, 6), torch.linspace(1, 3, 10)
    results = []
    for second in (optim.Factored(), optim.Exact()):
        p = nn.Parameter(start((6, 10)))
        optimizer = optim.AdamW([p], **ADAM, second=second)
        for t in range(20):
            p.grad = torch.outer(rows, columns) * (-1) ** t / (t + 1)
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=0, atol=BOUND)


REFUSED = [
    (optim.SGD, {"nesterov": True}), (optim.SGD, {"momentum": -0.1}), (optim.RMSprop, {"alpha": 1.0}),
    (optim.Adagrad, {"lr_decay": -1.0}), (optim.Lion, {"betas": (0.9, 1.0)}), (optim.AdEMAMix, {"t_alpha": 0}),
    (optim.AdEMAMix, {"t_beta3": 10, "betas": (0.0, 0.9, 0.99)}), (optim.LAMB, {"eps": -1.0}),
    (optim.LARS, {"lr": 0.1, "momentum": 1.0}), (optim.Adafactor, {"d": 0.0}), (optim.Adafactor, {"beta2_decay": 0.1}),
    (optim.Adafactor, {"eps": (None, -1.0)}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "bad"), REFUSED)
def test_hyper_parameters_out_of_range_are_refused(kind, bad):
    with pytest.raises(SpecError, match=kind.__name__):
        kind([nn.Parameter(torch.zeros(1))], **bad)
