# SPDX-License-Identifier: Apache-2.0
"""Clipping and loss scale: torch's and bitsandbytes' rules in numpy; what is not finite changes nothing."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from lowbits.errors import CheckpointError, SpecError
from lowbits.optim import AdamW, AdamW8bit, GlobalNorm, Percentile

SHAPES = ((16, 9), (7,), (300,))


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.linspace(-1, 1, math.prod(shape)).view(shape)) for shape in SHAPES]


def gradients(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = 10.0 ** (seed % 5 - 2)
    return [size * torch.randn(shape, generator=generator) for shape in SHAPES]


def step(params, optimizer, grads) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    optimizer.step()


def snapshot(params, optimizer):
    states = [copy.deepcopy(optimizer.state[p]) for p in params]
    return [p.detach().clone() for p in params], states


def same(params, optimizer, before) -> list[bool]:
    """Per parameter: are it and its whole state, step counter and history too, what they were?"""
    values, states = before
    return [
        torch.equal(p, value) and all(torch.equal(optimizer.state[p][k], t) for k, t in state.items())
        for p, value, state in zip(params, values, states, strict=True)
    ]


def test_a_global_norm_is_torchs():
    ours, theirs = parameters(), parameters()
    clipped = AdamW(ours, lr=1e-2, clip=GlobalNorm(0.7))
    plain = AdamW(theirs, lr=1e-2)
    for seed in range(5):
        step(ours, clipped, gradients(seed))
        for p, g in zip(theirs, gradients(seed), strict=True):
            p.grad = g
        norm = torch.nn.utils.get_total_norm([p.grad.double() for p in theirs])
        for p in theirs:  # clip_grad_norm_ adds 1e-6 to the norm, which is not wanted here
            p.grad.mul_((0.7 / norm.clamp_min(0.7)).float())
        plain.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def published(squares: list[float], history: int, percentile: int) -> float:
    """bitsandbytes' factor: a ring of squared norms, at first all of it the first one (csrc/kernels.cu)."""
    ring = np.full(history, squares[0])
    for t, square in enumerate(squares, 1):
        ring[t % history] = square
    return min(1.0, math.sqrt(np.sort(ring)[percentile * history // 100] / squares[-1]))


@pytest.mark.parametrize("clip", [Percentile(), Percentile(50, history=8)], ids=str)
def test_percentiles_are_bitsandbytes(clip):
    params = parameters()
    optimizer = AdamW(params, lr=1e-2, clip=clip)
    seen: list[list[float]] = [[] for _ in SHAPES]
    clipped = 0
    for seed in range(25):
        before = snapshot(params, optimizer)
        step(params, optimizer, gradients(seed))
        for index, (p, g) in enumerate(zip(params, gradients(seed), strict=True)):
            seen[index].append(float(g.double().square().sum()))
            factor = published(seen[index], clip.history, clip.percentile)
            clipped += factor < 1
            m = before[1][index].get("first.value", torch.zeros(()))
            expected = m + 0.1 * (g * factor - m)
            bound = 4 * 2.0**-24 * float(g.abs().max() + m.abs().max())  # a few float32 roundings of the summands
            torch.testing.assert_close(optimizer.state[p]["first.value"], expected, rtol=0, atol=bound)
    assert 20 < clipped < 75  # of 75: the rule was at work, and not everywhere


def test_the_history_is_in_the_checkpoint():
    def fresh():
        params = parameters()
        return params, AdamW8bit(params, lr=1e-2, clip=Percentile(50, history=8), min_8bit_size=0)

    whole, part, rest = fresh(), fresh(), fresh()
    for seed in range(12):
        step(*whole, gradients(seed))
    for seed in range(5):
        step(*part, gradients(seed))
    for p, q in zip(rest[0], part[0], strict=True):
        p.data.copy_(q)
    rest[1].load_state_dict(part[1].state_dict())
    for seed in range(5, 12):
        step(*rest, gradients(seed))
    assert all(same(*rest, snapshot(*whole)))


def test_the_history_of_a_bitsandbytes_checkpoint_goes_on():
    params = parameters()
    squares = [torch.arange(1.0, 101.0) * (i + 1) for i in range(3)]
    state = {
        i: {"step": 100, "state1": torch.zeros_like(p), "state2": torch.zeros_like(p), "gnorm_vec": squares[i].clone()}
        for i, p in enumerate(params)
    }
    group = {"params": [0, 1, 2], "lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    optimizer = AdamW(params, clip=Percentile(5))
    optimizer.load_state_dict({"state": state, "param_groups": [group]})
    step(params, optimizer, gradients(2))
    for p, g, ring in zip(params, gradients(2), squares, strict=True):
        ring[101 % 100] = g.double().square().sum()
        torch.testing.assert_close(optimizer.state[p]["clip.history"], ring.sqrt())
        factor = min(1.0, float((ring.sort().values[5] / g.square().sum()).sqrt()))
        torch.testing.assert_close(optimizer.state[p]["first.value"], 0.1 * g * factor)
    with pytest.raises(CheckpointError, match="100 gradient norms are stored for parameter 0"):
        AdamW(params, clip=Percentile(5, history=50)).load_state_dict({"state": state, "param_groups": [group]})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("clip", "untouched"), [(GlobalNorm(1.0), [True] * 3), (Percentile(), [False, True, False])])
def test_a_norm_that_is_not_finite_changes_nothing_that_it_belongs_to(clip, untouched, bad):
    params = parameters()
    optimizer = AdamW8bit(params, lr=1e-2, clip=clip, min_8bit_size=0)
    step(params, optimizer, gradients(0))
    before = snapshot(params, optimizer)
    grads = gradients(1)
    grads[1][3] = bad
    step(params, optimizer, grads)
    assert same(params, optimizer, before) == untouched
    step(params, optimizer, gradients(2))
    assert all(p.isfinite().all() for p in params)


def test_without_clipping_nan_is_not_hidden():
    params = parameters()
    optimizer = AdamW8bit(params, lr=1e-2, min_8bit_size=0)
    grads = gradients(0)
    grads[1][3] = math.nan
    step(params, optimizer, grads)
    assert params[1][3].isnan() and params[0].isfinite().all()


@pytest.mark.parametrize("unscaled_before", [False, True])
@pytest.mark.parametrize("clip", [None, GlobalNorm(0.7), Percentile(50, history=8)], ids=str)
def test_a_scaled_loss_gives_the_same_numbers_and_an_overflow_changes_nothing(clip, unscaled_before):
    scaled, plain = parameters(), parameters()
    ours, reference = AdamW8bit(scaled, lr=1e-2, clip=clip), AdamW8bit(plain, lr=1e-2, clip=clip)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for seed in range(6):
        loss = scaler.scale(sum((p * g).sum() for p, g in zip(scaled, gradients(seed), strict=True)))
        for p in scaled:
            p.grad = None
        loss.backward()
        if seed == 3:
            scaled[1].grad[0] = math.inf
            before = snapshot(scaled, ours)
        if unscaled_before:
            scaler.unscale_(ours)
        scaler.step(ours)
        scaler.update()
        if seed == 3:
            assert all(same(scaled, ours, before)) and scaler.get_scale() == 512.0
        else:
            step(plain, reference, gradients(seed))
    assert all(same(scaled, ours, snapshot(plain, reference)))


def test_out_of_range():
    for make in (lambda: GlobalNorm(0.0), lambda: GlobalNorm(math.nan), lambda: Percentile(0), lambda: Percentile(100)):
        with pytest.raises(SpecError, match="clip=None"):
            make()
    with pytest.raises(SpecError, match="history"):
        Percentile(5, history=1)
