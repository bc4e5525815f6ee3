# SPDX-License-Identifier: Apache-2.0
"""Going on from checkpoints of bitsandbytes, torchao and torch.optim, and back to torch.optim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowbits.errors import CheckpointError, SpecError
from lowbits.formats import DYNAMIC8, UDYNAMIC8
from lowbits.optim import (
    SGD,
    Adagrad,
    AdamW,
    AdamW8bit,
    AdEMAMix,
    Blockwise,
    CodecOptimizer,
    Lion,
    RMSprop,
    to_torch_state_dict,
)

SIGNED, UNSIGNED = Blockwise(DYNAMIC8), Blockwise(UDYNAMIC8)
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "bitsandbytes.pt"
# What bitsandbytes computes, in its own code books: it takes the signed one for RMSprop and Adagrad too.
COUNTERPARTS = {
    "AdamW": lambda ps: AdamW(ps, first=SIGNED, second=UNSIGNED, min_8bit_size=100),
    "Lion": lambda ps: Lion(ps, first=SIGNED, min_8bit_size=100),
    "SGD": lambda ps: SGD(ps, momentum=0.9, first=SIGNED, min_8bit_size=100),
    "RMSprop": lambda ps: RMSprop(ps, alpha=0.9, second=SIGNED, min_8bit_size=100),
    "Adagrad": lambda ps: Adagrad(ps, second=SIGNED, min_8bit_size=100),
    "AdEMAMix": lambda ps: AdEMAMix(ps, first=SIGNED, slow=SIGNED, second=UNSIGNED, min_8bit_size=100),
}


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return torch.load(GOLDEN, weights_only=True)


def parameters(like: list[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(p.clone()) for p in like]


def theirs(state: dict[str, Any], number: int) -> dict[str, Tensor]:
    """The state of one parameter of bitsandbytes, without nesting."""
    entry = state["state"][number]
    return {**entry, **entry.get("__bnb_optimizer_quant_state__", {})}


def in_their_order(optimizer: CodecOptimizer, p: nn.Parameter, part: str) -> list[Tensor]:
    return [
        optimizer.state[p][f"{moment}.{part}"].flatten()
        for moment in optimizer.rule_of(optimizer.param_groups[0]).moments
    ]


def bitsandbytes_parts(state: dict[str, Tensor], part: str) -> list[Tensor]:
    found = [state[f"{part}{number}"] for number in (1, 2) if f"{part}{number}" in state]
    stacked = state["state1"].ndim == 3
    return [t.flatten() for t in ([*found[0], *found[1:]] if stacked else found)]


@pytest.mark.parametrize("name", COUNTERPARTS)
@pytest.mark.parametrize("nested", [True, False])
def test_bitsandbytes_goes_on_here(golden: dict[str, Any], name: str, nested: bool) -> None:
    before, after = golden[name]["before"], golden[name]["after"]
    checkpoint = before["optimizer"]
    if not nested:
        checkpoint = {**checkpoint, "state": {i: theirs(checkpoint, i) for i in checkpoint["state"]}}
        for state in checkpoint["state"].values():
            state.pop("__bnb_optimizer_quant_state__", None)
    small, large = params = parameters(before["params"])
    optimizer = COUNTERPARTS[name](params)
    optimizer.load_state_dict(checkpoint)
    for ours, bnb in (("codes", "state"), ("scale", "absmax")):
        expected = bitsandbytes_parts(theirs(before["optimizer"], 1), bnb)
        assert all(map(torch.equal, in_their_order(optimizer, large, ours), expected))
    for p, g in zip(params, golden[name]["gradients"], strict=True):
        p.grad = g.clone()
    optimizer.step()
    lr = before["optimizer"]["param_groups"][0]["lr"]
    for p, expected in zip(params, after["params"], strict=True):
        assert ((p - expected).abs() <= 2e-7 * expected.abs() + 1e-3 * lr).all()
    then = theirs(after["optimizer"], 1)
    for ours, expected in zip(
        in_their_order(optimizer, large, "codes"), bitsandbytes_parts(then, "state"), strict=True
    ):
        off = (ours.int() - expected.int()).abs()
        # bitsandbytes' compiled CPU quantizer is not always at the nearest point: twice in 270 here, by float64.
        assert off.max() <= 1 and (off > 0).sum() <= 2
    for ours, expected in zip(
        in_their_order(optimizer, large, "scale"), bitsandbytes_parts(then, "absmax"), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


def test_blocks_of_2048_are_encoded_anew() -> None:
    value = torch.randn(3, 2048, generator=torch.Generator().manual_seed(0))
    scale = value.abs().amax(1, keepdim=True)
    codes = SIGNED._codes(value / scale)
    points = torch.tensor(DYNAMIC8.code_values)
    state = {"step": 7, "state1": codes, "qmap1": points, "absmax1": scale.flatten()}
    (p,) = parameters([torch.zeros(3, 2048)])
    optimizer = Lion([p], first=SIGNED)
    optimizer.load_state_dict({"state": {0: state}, "param_groups": [{"lr": 0.5, "betas": (0.9, 0.99), "params": [0]}]})
    decoded = points[codes.long()] * scale
    # Half of the widest gap of the code book, of each new block's largest magnitude.
    bound = decoded.view(-1, 256).abs().amax(1, keepdim=True) * points.diff().max() / 2
    assert ((optimizer.moment(p, "first") - decoded).view(-1, 256).abs() <= bound * (1 + 1e-5)).all()
    assert optimizer.state[p]["step"] == 7 and optimizer.param_groups[0]["lr"] == 0.5


PAIRS = {
    "AdamW": (lambda ps: AdamW(ps, lr=1e-2), lambda ps: torch.optim.AdamW(ps, lr=1e-2)),
    "SGD": (lambda ps: SGD(ps, lr=1e-2, momentum=0.9), lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9)),
    "RMSprop": (lambda ps: RMSprop(ps, lr=1e-2), lambda ps: torch.optim.RMSprop(ps, lr=1e-2)),
    "Adagrad": (lambda ps: Adagrad(ps, lr=1e-2), lambda ps: torch.optim.Adagrad(ps, lr=1e-2)),
}


def learn(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("to_torch", [True, False])
def test_training_moves_between_torch_and_here(name: str, to_torch: bool) -> None:
    start = [torch.linspace(-1, 1, 12).view(3, 4), torch.ones(2)]
    ours, torchs = PAIRS[name]
    first, then = (ours, torchs) if to_torch else (torchs, ours)
    params = parameters(start)
    one = first(params)
    one.param_groups[0]["lr"] = 3e-2
    learn(params, one, range(3))
    other_params = parameters(params)
    other = then(other_params)
    other.load_state_dict(to_torch_state_dict(one) if to_torch else one.state_dict())
    learn(params, one, range(3, 6))
    learn(other_params, other, range(3, 6))
    for p, q in zip(params, other_params, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=6 * 4 * 2**-24)  # a few roundings a step of values up to 2


def test_float32_moments_of_torch_are_encoded() -> None:
    (p,) = parameters([torch.zeros(4, 256)])
    reference = torch.optim.AdamW([p])
    learn([p], reference, range(2))
    (q,) = parameters([torch.zeros(4, 256)])
    optimizer = AdamW8bit([q], min_8bit_size=0)
    optimizer.load_state_dict(reference.state_dict())
    for moment, key in (("first", "exp_avg"), ("second", "exp_avg_sq")):
        expected = reference.state[p][key]
        assert (optimizer.moment(q, moment) - expected).abs().max() <= 0.01 * expected.abs().max()
        assert optimizer.state[q][f"{moment}.codes"].dtype == torch.uint8


class TorchaoState:
    """What torchao's 8-bit state is to a reader: a tensor that knows how it is stored."""

    def __init__(self, codes: Tensor, scale: Tensor, qmap: Tensor) -> None:
        self.codes, self.scale, self.qmap = codes, scale, qmap

    def dequantize(self) -> Tensor:
        raise AssertionError("codes are taken over as they are")


def test_codes_of_torchao_are_taken_over() -> None:
    (p,) = parameters([torch.zeros(2, 256)])
    codes = torch.randint(1, 255, (2, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    moments = {
        key: TorchaoState(codes, torch.tensor([0.5, 2.0]), torch.tensor(book.code_values))
        for key, book in (("exp_avg", DYNAMIC8), ("exp_avg_sq", UDYNAMIC8))
    }
    optimizer = AdamW8bit([p], min_8bit_size=0)
    groups = [{"lr": torch.tensor(1e-3), "params": [0]}]
    optimizer.load_state_dict({"state": {0: {"step": torch.tensor(3.0), **moments}}, "param_groups": groups})
    assert torch.equal(optimizer.state[p]["second.codes"], codes)
    assert optimizer.state[p]["first.scale"].flatten().tolist() == [0.5, 2.0]


def test_what_the_optimizer_has_no_place_for_is_refused() -> None:
    (p,) = parameters([torch.zeros(3, 4)])
    amsgrad = torch.optim.AdamW([p], amsgrad=True)
    learn([p], amsgrad, range(1))
    with pytest.raises(CheckpointError, match="max_exp_avg_sq"):
        AdamW([p]).load_state_dict(amsgrad.state_dict())
    with pytest.raises(CheckpointError, match="exp_avg, exp_avg_sq, which are not the moments first of"):
        SGD([p], momentum=0.9).load_state_dict(torch_adamw(p).state_dict())
    (q,) = parameters([torch.zeros(2, 4)])
    with pytest.raises(CheckpointError, match="has 12 elements"):
        AdamW([q]).load_state_dict(torch_adamw(p).state_dict())
    with pytest.raises(SpecError, match="no counterpart of Lion"):
        to_torch_state_dict(Lion([p]))


def torch_adamw(p: nn.Parameter) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW([p])
    learn([p], optimizer, range(1))
    return optimizer
