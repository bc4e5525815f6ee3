# SPDX-License-Identifier: Apache-2.0
"""Compiled CPU steps are the eager ones bit for bit; what cannot be compiled runs eagerly; one compilation a rule."""

from __future__ import annotations

import warnings
from unittest import mock

import pytest
import torch
from torch import nn

from lowbits import optim
from lowbits.formats import INT8
from lowbits.kernels import _c_compiler
from lowbits.optim import _compiled
from lowbits.optim._as_c import rule_as_c
from lowbits.optim._rule import root
from lowbits.quantizers import Rounding

SIZES = (1, 255, 256, 257, 4097, 70_000)
NUMBERS = (torch.float32, torch.bfloat16)


CACHED = (_c_compiler.folder, _c_compiler.library, _compiled._library)


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """A user's cache with nothing in it, and a process that has compiled nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in CACHED:
        cached.cache_clear()
    yield tmp_path / "lowbits"
    for cached in CACHED:
        cached.cache_clear()


def parameters(dtype=torch.float32, sizes=SIZES):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter((torch.randn(n, generator=generator) * 0.02).to(dtype)) for n in sizes]


def give_gradients_(params, step: int):
    """Gradients over twelve decades, with zeros, whole blocks of them too."""
    generator = torch.Generator().manual_seed(step)
    for p in params:
        g = torch.randn(p.shape, generator=generator) * torch.exp(torch.randn(p.shape, generator=generator) * 4) * 1e-3
        g[::7] = 0
        g[512:1100] = 0
        p.grad = g.to(p.dtype)


def train(build, params, steps=4):
    """Return the parameters, all state tensors, and how many tensors the compiled path left to the eager one."""
    optimizer, left = build(params), []
    compiled = _compiled.update_

    def spy(optimizer, work):
        rest = compiled(optimizer, work)
        left.append(len(rest))
        return rest

    with mock.patch.object(_compiled, "update_", spy):
        for step in range(steps):
            give_gradients_(params, step)
            optimizer.step()
    return params, [t for p in params for t in optimizer.state[p].values()], left


def eagerly(build, params, steps=4):
    with mock.patch.object(_compiled, "SMALLEST_STEP", float("inf")):
        return train(build, params, steps)


def check(build, dtype=torch.float32, sizes=SIZES):
    params, states, left = train(build, parameters(dtype, sizes))
    expected, eager_states, all_left = eagerly(build, parameters(dtype, sizes))
    assert left == [0] * 4, "the compiled path refused tensors"
    assert all_left == [len(sizes)] * 4
    assert all(torch.equal(a, b) for a, b in zip(params + states, expected + eager_states, strict=True))


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_adamw_in_8_bits_is_eager_bit_for_bit(dtype):
    check(lambda params: optim.AdamW8bit(params, lr=1e-2, weight_decay=0.1, min_8bit_size=0), dtype)


BUILDS = {
    "stochastic": lambda p: optim.AdamW8bit(p, rounding=Rounding.STOCHASTIC, min_8bit_size=0, seed=5),
    "clipped": lambda p: optim.AdamW8bit(p, clip=optim.GlobalNorm(1e-3), min_8bit_size=0),
    "blocks of 64": lambda p: optim.AdamW8bit(p, block_size=64, min_8bit_size=0),
    "blocks of 4096": lambda p: optim.AdamW8bit(p, block_size=4096, min_8bit_size=0),
    "4 bits": lambda p: optim.AdamW4bit(p, min_8bit_size=0),
    "exact": lambda p: optim.AdamW(p, first=optim.Exact(torch.bfloat16)),
    "small ones exact": optim.AdamW8bit,
    "two groups": lambda p: optim.AdamW8bit([{"params": p[:2]}, {"params": p[2:], "lr": 0.1}], lr=1e-2),
}


@pytest.mark.parametrize("name", BUILDS)
def test_options_are_eager_bit_for_bit(name):
    check(BUILDS[name], torch.bfloat16)


RULES = {
    "adam": lambda p: optim.Adam8bit(p, weight_decay=0.1),
    "lion": optim.Lion8bit,
    "momentum": lambda p: optim.SGD8bit(p, lr=1e-2, momentum=0.9),
    "nesterov": lambda p: optim.SGD8bit(p, lr=1e-2, momentum=0.9, nesterov=True),
    "sgd": lambda p: optim.SGD(p, lr=1e-2),
    "rmsprop": optim.RMSprop8bit,
    "adagrad": optim.Adagrad8bit,
    "ademamix": optim.AdEMAMix8bit,
}


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_eager_bit_for_bit(name):
    check(RULES[name])


def test_results_do_not_depend_on_the_number_of_threads():
    one, states, _ = train(optim.AdamW8bit, parameters(sizes=(100_000, 3000)))
    with mock.patch.object(torch, "get_num_threads", lambda: 3):
        three, other, _ = train(optim.AdamW8bit, parameters(sizes=(100_000, 3000)))
    assert all(torch.equal(a, b) for a, b in zip(one + states, three + other, strict=True))


def test_one_compilation_serves_every_rate_step_and_size(empty_cache):
    params = parameters(sizes=(70_000,))
    optimizer = optim.AdamW8bit(params)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)
        give_gradients_(params, step)
        optimizer.step()
    optimizer.add_param_group({"params": parameters(sizes=(80_001,)), "weight_decay": 0.0})
    give_gradients_(optimizer.param_groups[1]["params"], 9)
    optimizer.step()
    assert len(list(empty_cache.iterdir())) == 1


def test_without_a_compiler_the_step_is_eager_and_says_so_once(empty_cache, monkeypatch):
    monkeypatch.setattr(_c_compiler, "COMPILERS", ("no-such-compiler",))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        params, _, left = train(optim.AdamW8bit, parameters())
    assert left == [len(SIZES)] * 4
    assert [str(w.message).partition(" (")[0] for w in said] == ["no C compiler"]
    expected, *_ = eagerly(optim.AdamW8bit, parameters())
    assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))


def test_a_compiler_that_fails_leaves_its_words_and_no_file(empty_cache):
    with pytest.warns(UserWarning, match="no C compiler .*error"):
        assert _c_compiler.library("this is not C") is None
    assert not list(empty_cache.iterdir())


def test_what_the_source_does_not_know_is_left_to_eager():
    def build(params):
        return optim.AdamW8bit([{"params": params[0], "first": optim.Blockwise(INT8)}, {"params": params[1:]}])

    def make():
        params = parameters(sizes=(70_000, 5000, 6000))
        params[1] = nn.Parameter(params[1].detach().view(50, 100).t())  # not contiguous
        return params

    params, states, left = train(build, make())
    expected, eager_states, _ = eagerly(build, make())
    assert left == [2] * 4
    assert all(torch.equal(a, b) for a, b in zip(params + states, expected + eager_states, strict=True))


def test_gradients_of_another_layout():
    def step():
        params = [nn.Parameter(torch.linspace(-1, 1, 70_000).view(700, 100)) for _ in range(2)]
        optimizer = optim.AdamW8bit(params)
        params[0].grad = torch.linspace(-2, 1, 70_000).view(100, 700).t()
        params[1].grad = torch.full((700, 100), 3e-4)
        optimizer.step()
        return params

    with mock.patch.object(_compiled, "SMALLEST_STEP", float("inf")):
        expected = step()
    assert all(torch.equal(a, b) for a, b in zip(step(), expected, strict=True))


def test_rules_that_look_at_whole_tensors_stay_eager():
    _, _, left = train(optim.LAMB8bit, parameters(), steps=1)
    assert left == [len(SIZES)]


def test_translation_keeps_every_rounding_and_refuses_the_rest():
    rule = lambda p, g, m, h: (p * (1 - h["lr"]) - root(g), ())  # noqa: E731
    body = rule_as_c(rule, 0, ("lr",))
    assert body is not None
    shared, _, each = body.partition("#pragma")
    assert "(float)(1.0) - h[0]" in shared
    assert "sqrtf(" in each
    assert rule_as_c(lambda p, g, m, h: (p - g.sqrt(), ()), 0, ("lr",)) is None  # torch's float32 root is not IEEE
    assert rule_as_c(lambda p, g, m, h: (p - g.double() * 2, ()), 0, ("lr",)) is None
    assert rule_as_c(lambda p, g, m, h: (p - g.mean(), ()), 0, ("lr",)) is None
    assert rule_as_c(lambda p, g, m, h: (p if p.sum() > 0 else g, ()), 0, ("lr",)) is None
