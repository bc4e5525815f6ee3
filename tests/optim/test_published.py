# SPDX-License-Identifier: Apache-2.0
"""8-bit steps against recorded values: a vector (C4), drift (C6), scale invariance (C7) and bytes (C9)."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from lowbits import optim
from lowbits.formats import DYNAMIC8, UDYNAMIC8, Codebook
from lowbits.optim import Blockwise

AT = [0, 1, 64, 127, 128, 129, 192, 255]
# Of each of two steps: both scales, codes at AT and their sums, parameters at all of AT but 1 and 192. Recorded from
# the published code books with a search in float64, decay before the step.
VECTOR = [
    ((4.99999989e-4, 2.49999989e-8),
     ([0, 0, 35, 99, 127, 155, 219, 254], 32385), ([255, 252, 148, 11, 0, 11, 148, 252], 37233),
     [0.100998998, 0.100998996, 0.100998744, 0.099999000, 0.098999256, 0.098999002]),
    ((1.98789051e-4, 3.12249986e-8),
     ([0, 0, 35, 98, 127, 156, 219, 255], 32386), ([255, 252, 148, 11, 0, 11, 148, 252], 37233),
     [0.101260111, 0.101264758, 0.101281522, 0.099998000, 0.098714478, 0.098730985]),
]  # fmt: skip


def test_c4_two_steps_give_the_recorded_codes_scales_and_parameters():
    p = nn.Parameter(torch.full((256,), 0.1))
    optimizer = optim.AdamW8bit([p], lr=1e-3, weight_decay=0.01, min_8bit_size=0)
    g = (torch.arange(256) - 128).float() / 256 * 0.01
    for step, (scales, first, second, values) in enumerate(VECTOR):
        p.grad = g * (-0.5) ** step
        optimizer.step()
        state = optimizer.state[p]
        for moment, scale, (codes, total) in zip(("first", "second"), scales, (first, second), strict=True):
            assert state[f"{moment}.scale"].item() == pytest.approx(scale, rel=1e-6)
            assert state[f"{moment}.codes"][AT].tolist() == codes and state[f"{moment}.codes"].sum() == total
        torch.testing.assert_close(p.detach()[[0, 64, 127, 128, 129, 255]], torch.tensor(values), rtol=0, atol=2e-8)


def drift(codecs, sigma, count=32_768, scale=1e-2, eps=1e-8):
    """Distance from 32-bit Adam after 100 steps, over its way; and the largest deviation of an element in lr."""
    generator = torch.Generator().manual_seed(0)
    scales = 10 ** (sigma * torch.randn(count, generator=generator)) * scale
    p, q = (nn.Parameter(torch.zeros(count)) for _ in range(2))
    hyper = {"lr": 1e-3, "eps": eps, "weight_decay": 0.0}
    few, exact = optim.AdamW([p], **hyper, **codecs), optim.AdamW([q], **hyper)
    for _ in range(100):
        p.grad = q.grad = torch.randn(count, generator=generator) * scales
        few.step()
        exact.step()
    with torch.no_grad():
        return ((p - q).norm() / q.norm()).item(), (p - q).abs().max().item() / 1e-3


EIGHT = {"first": Blockwise(DYNAMIC8), "second": Blockwise(UDYNAMIC8)}
ZERO_FROM_POSITIVE = {"first": Blockwise(DYNAMIC8), "second": Blockwise(Codebook("published", UDYNAMIC8.points))}


def test_c6_drift_is_the_published_one_where_nothing_underflows():
    for sigma, recorded, within in [(0.0, 0.022, 0.003), (0.25, 0.044, 0.006)]:
        assert drift(EIGHT, sigma)[0] == pytest.approx(recorded, abs=within)


def test_c6_a_second_moment_that_never_becomes_zero_keeps_the_tail():
    """Gradients three decades apart within a block: rounding v to 0 makes steps of thousands of lr."""
    distance, worst = drift(EIGHT, 0.5, count=131_072)
    assert distance <= 0.12 and worst <= 50
    distance, worst = drift(ZERO_FROM_POSITIVE, 0.5)
    assert distance > 1 and worst > 1000


def test_c7_the_scale_of_the_gradients_does_not_matter():
    as_is = drift(EIGHT, 0.0, count=16_384, eps=1e-20)[0]
    for smaller in (1e-8, 1e-10):
        assert drift(EIGHT, 0.0, count=16_384, scale=1e-2 * smaller, eps=1e-20)[0] == pytest.approx(as_is, rel=0.01)


# Bytes of state a parameter: a byte a moment and a scale every 256, or half a byte and a scale every 128.
BYTES = {
    "AdamW8bit": 2.04, "Adam8bit": 2.04, "LAMB8bit": 2.04, "AdamWFp8": 2.04, "AdamFp8": 2.04, "AdEMAMix8bit": 3.06,
    "Lion8bit": 1.02, "RMSprop8bit": 1.02, "Adagrad8bit": 1.02, "LARS8bit": 1.02, "SGD8bit": 1.02, "AdamW4bit": 1.07,
    "Adam4bit": 1.07, "Adafactor8bit": 2.04,
}  # fmt: skip
ARGUMENTS = {
    "SGD8bit": {"lr": 1e-3, "momentum": 0.9}, "LARS8bit": {"lr": 1e-3}, "Adafactor8bit": {"beta1": 0.9},
}  # fmt: skip


@pytest.mark.parametrize("name", BYTES)
def test_c9_the_bytes_are_measured_and_nothing_large_is_left_in_32_bits(name):
    large = [nn.Parameter(torch.randn(shape)) for shape in [(4096,), (1000, 333), (64, 9, 64)]]
    small = nn.Parameter(torch.randn(4095))
    optimizer = getattr(optim, name)([*large, small], **ARGUMENTS.get(name, {}))
    for p in [*large, small]:
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p in large:
        nbytes = sum(t.untyped_storage().nbytes() for part, t in optimizer.state[p].items() if part != "step")
        assert nbytes <= BYTES[name] * p.numel()
    assert all(part == "step" or t.dtype == torch.float32 for part, t in optimizer.state[small].items())


def test_every_constructor_is_in_the_table_of_bytes_and_takes_the_arguments_of_its_class():
    built = {n for n in optim.__all__ if inspect.isfunction(getattr(optim, n)) and n.endswith(("bit", "Fp8"))}
    assert built == set(BYTES)
    for name in built:
        make = getattr(optim, name)
        ours = inspect.signature(make).parameters
        kind = getattr(optim, inspect.signature(make).return_annotation)
        theirs = {k: v for k, v in inspect.signature(kind).parameters.items() if k not in kind.rule.moments}
        shared = {k: (v.default, v.kind, v.annotation) for k, v in ours.items() if k != "block_size"}
        assert shared == {k: (v.default, v.kind, v.annotation) for k, v in theirs.items()}
