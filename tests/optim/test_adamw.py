# SPDX-License-Identifier: Apache-2.0
"""AdamW against float64 and torch; moments stored in few bits against the published fake path (U7); resume (U11)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowbits.errors import CheckpointError, SpecError
from lowbits.formats import E4M3, INT4, INT8, UINT8_NO_ZERO
from lowbits.nn import Recipe, convert_
from lowbits.optim import AdamW, Exact, Quantized, adamw_update, param_groups
from lowbits.optim._optimizer import parts_of
from lowbits.quantizers import PerBlock, PerRow, PerTensor, QuantSpec, Rounding, quantize
from lowbits.recipes import named
from tests.oracles.linear_quantizer import adamw

HYPER = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def gradients(steps: int, shape=(6, 10)):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) * 0.1 for _ in range(steps)]


def train(codecs: dict, steps: int = 50, shape=(6, 10)):
    p = nn.Parameter(torch.linspace(-1, 1, int(np.prod(shape))).view(shape))
    optimizer = AdamW([p], **HYPER, **codecs)
    for g in gradients(steps, shape):
        p.grad = g.clone()
        optimizer.step()
    return p, optimizer


def test_exact_follows_the_paper_in_float64():
    p, _ = train({})
    expected, m, v = torch.linspace(-1, 1, 60).view(6, 10).double().numpy(), 0.0, 0.0
    for t, g in enumerate(gradients(50), 1):
        expected, m, v = adamw(expected, g.double().numpy(), m, v, t, 3e-3, (0.9, 0.99), 1e-8, 0.1)
    # 50 steps of about 3e-3, each off by a few float32 roundings of values up to 1: 50 * 4 * 2^-24.
    np.testing.assert_allclose(p.detach().numpy(), expected, rtol=0, atol=50 * 4 * 2**-24)


def test_exact_agrees_with_torch():
    p, _ = train({})
    q = nn.Parameter(torch.linspace(-1, 1, 60).view(6, 10))
    reference = torch.optim.AdamW([q], **HYPER)
    for g in gradients(50):
        q.grad = g.clone()
        reference.step()
    torch.testing.assert_close(p, q, rtol=0, atol=50 * 4 * 2**-24)


def fake_path(first: QuantSpec | None, second: QuantSpec | None, steps: int = 50) -> torch.Tensor:
    """The study's code: moments in float32, quantized on load."""
    load = lambda x, spec: x if spec is None else quantize(x, spec).dequantize()  # noqa: E731
    p, m, v = torch.linspace(-1, 1, 60).view(6, 10), torch.zeros(6, 10), torch.zeros(6, 10)
    b1, b2 = HYPER["betas"]
    for t, g in enumerate(gradients(steps), 1):
        scalars = {
            "lr": HYPER["lr"], "beta1": b1, "rest1": 1 - b1, "beta2": b2, "rest2": 1 - b2, "eps": HYPER["eps"],
            "decay": HYPER["weight_decay"], "c_beta1": 1 - b1**t, "c_beta2": 1 - b2**t,
        }  # fmt: skip
        h = {name: torch.tensor(value) for name, value in scalars.items()}
        p, (m, v) = adamw_update(p, g, (load(m, first), load(v, second)), h)
    return p


FIRST = [QuantSpec(f, g) for f, g in itertools.product((INT8, INT4), (PerTensor(), PerRow()))]
SECOND = [None, QuantSpec(INT8, PerRow()), QuantSpec(INT8), QuantSpec(UINT8_NO_ZERO, PerRow())]


@pytest.mark.parametrize(("first", "second"), list(itertools.product([None, *FIRST], SECOND)), ids=str)
def test_u7_int_storage_is_the_fake_path_bit_for_bit(first, second):
    codecs = {n: Quantized(s) for n, s in (("first", first), ("second", second)) if s is not None}
    p, _ = train(codecs)
    assert torch.equal(p.detach(), fake_path(first, second))


def test_the_bytes_are_few():
    shape = (64, 100)
    for spec, code_bytes, scales in [
        (QuantSpec(INT8, PerRow()), 6400, 64), (QuantSpec(INT4), 3200, 1), (QuantSpec(E4M3, PerBlock(256)), 6400, 25),
    ]:  # fmt: skip
        _, optimizer = train({"first": Quantized(spec)}, steps=1, shape=shape)
        (state,) = optimizer.state.values()
        stored = {name: t.untyped_storage().nbytes() for name, t in parts_of(state, "first").items()}
        assert stored == {"codes": code_bytes, "scale": 4 * scales}


def test_channel_scales_follow_the_output_channels_of_conv1d():
    linear, conv = nn.Linear(10, 6), Conv1D(6, 10)
    conv.weight.data.copy_(linear.weight.data.t())
    results = []
    for layer in (linear, conv):
        model = nn.Sequential(layer)
        convert_(model, named("m4_channel"), verbose=False)
        optimizer = AdamW(param_groups(model, 0.1), lr=1e-2)
        for g in gradients(5):
            layer.weight.grad = g.t().contiguous() if layer is conv else g.clone()
            optimizer.step()
        assert optimizer.state[layer.weight]["first.scale"].shape == (6, 1)
        results.append(layer.weight.detach().t() if layer is conv else layer.weight.detach())
    assert torch.equal(*results)


def test_groups_decay_matrices_only_and_quantize_converted_weights_only():
    model = nn.ModuleDict(
        {"emb": nn.Embedding(5, 4), "norm": nn.LayerNorm(4), "a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}
    )
    convert_(model, lambda name, _: named("m8_channel") if name == "a" else None, verbose=False)
    groups = param_groups(model, 0.1)
    where = {id(p): g for g in groups for p in g["params"]}
    assert len(where) == len(list(model.parameters()))
    assert {n for n, p in model.named_parameters() if where[id(p)]["weight_decay"]} == {
        "emb.weight",
        "a.weight",
        "b.weight",
    }
    assert {n for n, p in model.named_parameters() if "first" in where[id(p)]} == {"a.weight"}


CODECS = {
    "exact": {},
    "int8": {"first": Quantized(QuantSpec(INT8, PerRow())), "second": Quantized(QuantSpec(UINT8_NO_ZERO, PerRow()))},
    "int4 stochastic": {"first": Quantized(QuantSpec(INT4, rounding=Rounding.STOCHASTIC))},
    "bf16": {"first": Exact(torch.bfloat16)},
}


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_u11_resume_is_bit_exact(name, dtype):
    def fresh():
        p = nn.Parameter(torch.linspace(-1, 1, 60).view(6, 10).to(dtype))
        return p, AdamW([p], **HYPER, **CODECS[name])

    def steps(p, optimizer, gs):
        for g in gs:
            p.grad = g.to(dtype)
            optimizer.step()

    gs = gradients(12)
    p, optimizer = fresh()
    steps(p, optimizer, gs)
    q, first_half = fresh()
    steps(q, first_half, gs[:5])
    saved, weights = first_half.state_dict(), q.detach().clone()
    r, second_half = fresh()
    r.data.copy_(weights)
    second_half.load_state_dict(saved)
    steps(r, second_half, gs[5:])
    assert torch.equal(p, r)
    for moment in ("first", "second"):
        one, other = parts_of(optimizer.state[p], moment), parts_of(second_half.state[r], moment)
        assert all(torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one)


def test_states_of_another_codec_or_shape_are_refused_and_change_nothing():
    _, int8 = train({"first": Quantized(QuantSpec(INT8, PerRow()))}, steps=2)
    p, exact = train({}, steps=2)
    before = exact.state[p]["first.value"].clone()
    with pytest.raises(CheckpointError, match="first moment of group 0 is stored as 'quantized v1, int8 row'"):
        exact.load_state_dict(int8.state_dict())
    with pytest.raises(CheckpointError, match="first moment of parameter 0"):
        exact.load_state_dict(train({}, steps=2, shape=(5, 10))[1].state_dict())
    assert torch.equal(exact.state[p]["first.value"], before)


def test_hyper_parameters_out_of_range_are_refused():
    for bad in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1e-8}, {"weight_decay": -0.1}):
        with pytest.raises(SpecError, match="AdamW"):
            AdamW([nn.Parameter(torch.zeros(1))], **bad)


def test_unused_parameters_and_plain_recipes_need_nothing():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    convert_(model, Recipe(), verbose=False)
    optimizer = AdamW(param_groups(model, 0.0))
    model[0](torch.randn(2, 3)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 2
