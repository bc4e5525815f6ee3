# SPDX-License-Identifier: Apache-2.0
"""Steps against bitsandbytes' on a CPU (C5), from the same state; needs `pip install lowbits[peers]`."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from lowbits import optim
from lowbits.formats import DYNAMIC8, UDYNAMIC8
from lowbits.optim import Blockwise
from lowbits.quantizers import Noise

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns of missing CUDA and of its own imports
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="no bitsandbytes: pip install lowbits[peers]")
peer, functional = bitsandbytes.optim, bitsandbytes.functional

SIZE = (250, 330)  # the last block is short
STEPS = 20
HYPER = {"lr": 1e-3, "weight_decay": 0.1}
BETAS = {**HYPER, "betas": (0.9, 0.99)}
MIX = {**HYPER, "betas": (0.9, 0.99, 0.999), "alpha": 5.0, "t_alpha": 40, "t_beta3": 30}
# name: our class, theirs, hyper-parameters. Their codes of moments without a sign are signed but for Adam's.
CASES = {
    "adamw": (optim.AdamW, "AdamW8bit", BETAS),
    "momentum": (optim.SGD, "SGD8bit", {**HYPER, "momentum": 0.9}),
    "rmsprop": (optim.RMSprop, "RMSprop8bit", {**HYPER, "alpha": 0.99}),
    "adagrad": (optim.Adagrad, "Adagrad8bit", HYPER),
    "lion": (optim.Lion, "Lion8bit", BETAS),
    "ademamix": (optim.AdEMAMix, "AdEMAMix8bit", MIX),
}


def copy_state(ours, theirs):
    """Overwrite their moments by ours, stacked as they stack them."""
    for kind, part in (("state", "codes"), ("absmax", "scale")):
        known = [ours[f"{moment}.{part}"] for moment in ("first", "slow", "second") if f"{moment}.{part}" in ours]
        if len(known) == 3:
            known = [torch.stack(known[:2]), known[2]]
        for number, value in enumerate(known, 1):
            theirs[f"{kind}{number}"].copy_(value.view(theirs[f"{kind}{number}"].shape))


def moments(ours, theirs):
    """Codes and scales of both, moment by moment."""
    names = [moment for moment in ("first", "slow", "second") if f"{moment}.codes" in ours]
    for kind, part in (("state", "codes"), ("absmax", "scale")):
        found = [theirs[f"{kind}{n}"] for n in (1, 2) if f"{kind}{n}" in theirs]
        if len(names) == 3:
            found = [*found[0], found[1]]
        for name, value in zip(names, found, strict=True):
            yield part, ours[f"{name}.{part}"].reshape(-1), value.reshape(-1)


@pytest.mark.parametrize("name", CASES)
def test_c5_steps_and_codes_are_those_of_bitsandbytes(name):
    kind, other, hyper = CASES[name]
    unsigned = UDYNAMIC8 if name in ("adamw", "ademamix") else DYNAMIC8
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(SIZE, generator=generator) * 0.1
    p, q = (nn.Parameter(start.clone()) for _ in range(2))
    codecs = {moment: Blockwise(DYNAMIC8 if signed else unsigned) for moment, signed in kind.rule.moments.items()}
    ours, theirs = kind([p], **hyper, **codecs), getattr(peer, other)([q], **hyper)
    for step in range(STEPS):
        p.grad = torch.randn(SIZE, generator=generator) * 0.01
        q.grad = p.grad.clone()
        if step:
            q.data.copy_(p.data)
            copy_state(ours.state[p], theirs.state[q])
        ours.step()
        theirs.step()
        assert (p - q).abs().mean() <= 1e-8
        for part, one, two in moments(ours.state[p], theirs.state[q]):
            if part == "scale":
                torch.testing.assert_close(one, two, rtol=1e-6, atol=0)
            else:  # their native code searches a coarser table; the next test says who is nearer
                assert (one != two).float().mean() <= 0.04


@pytest.mark.parametrize("book", [DYNAMIC8, UDYNAMIC8], ids=str)
def test_where_codes_differ_from_bitsandbytes_ours_are_nearer(book):
    x = torch.randn(82_500) * 0.01
    x = x if book is DYNAMIC8 else x.square()
    theirs, state = functional.quantize_blockwise(
        x, code=functional.create_dynamic_map(signed=book is DYNAMIC8), blocksize=256
    )
    codec = Blockwise(book)
    stored = codec.init(x)
    codec.encode_(stored, x, Noise.of(0, "x", "moment"), torch.tensor(1))
    ours = stored["codes"]
    assert torch.equal(state.code, torch.tensor(book.points)) and torch.equal(stored["scale"], state.absmax)
    y = x.double() / state.absmax.repeat_interleave(256)[: x.numel()]
    points = torch.tensor(book.points, dtype=torch.float64)
    distance, their_distance = ((points[codes.long()] - y).abs() for codes in (ours, theirs))
    underflow = (theirs == 0) & (ours == 1) & (book is UDYNAMIC8)
    # Quotients within a few units in the last place of a middle may fall on either side of it.
    assert ((distance <= their_distance * (1 + 1e-5)) | underflow).all()
    assert (ours != theirs).float().mean() <= 0.04
