# SPDX-License-Identifier: Apache-2.0
"""States through files and copies: bit for bit, or a clear refusal."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from lowbits.errors import CheckpointError
from lowbits.formats import DYNAMIC4, DYNAMIC8, E4M3, UDYNAMIC8, ULINEAR4, Codebook
from lowbits.optim import AdamW, AdamW8bit, Blockwise, CodecOptimizer, Exact, GlobalNorm, state_report
from lowbits.quantizers import Rounding

Model = tuple[list[nn.Parameter], CodecOptimizer]


def build() -> Model:
    """Groups of different codecs, one frozen parameter, a ragged one, and a learning rate that is a tensor."""
    sizes = [(4, 256), (3, 100), (7,), (6, 64)]
    params = [nn.Parameter(torch.linspace(-1, 1, torch.Size(s).numel()).view(s).bfloat16()) for s in sizes]
    params[2].requires_grad_(False)
    four = {"first": Blockwise(DYNAMIC4, 128), "second": Blockwise(ULINEAR4, 128)}
    optimizer = AdamW8bit(params[:3], lr=1e-2, min_8bit_size=0, rounding=Rounding.STOCHASTIC, clip=GlobalNorm(0.5))
    optimizer.add_param_group({"params": params[3:], "lr": torch.tensor(3e-3), "weight_decay": 0.0, **four})
    return params, optimizer


def steps(model: Model, numbers: range) -> None:
    params, optimizer = model
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for p in params:
            if p.requires_grad:
                p.grad = torch.randn(p.shape, generator=generator).bfloat16()
        if number < 2:
            params[3].grad = None  # joins late
        optimizer.step()


def bits(model: Model) -> list[Tensor]:
    params, optimizer = model
    return [*params, *(tensor for p in params for _, tensor in sorted(optimizer.state.get(p, {}).items()))]


def through_pickle(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_safetensors(state: dict[str, Any]) -> dict[str, Any]:
    flat = {f"{index}:{name}": t for index, entry in state["state"].items() for name, t in entry.items()}
    restored: dict[int, dict[str, Tensor]] = {index: {} for index in state["state"]}
    for key, tensor in load(save(flat)).items():
        index, _, name = key.partition(":")
        restored[int(index)][name] = tensor
    return {**state, "state": restored}


@pytest.mark.parametrize("through", [through_pickle, through_safetensors])
def test_c10_ten_steps_after_a_reload_are_those_without_one(through: Callable[[dict], dict]) -> None:
    whole, first = build(), build()
    steps(whole, range(13))
    steps(first, range(3))
    second = build()
    for p, q in zip(second[0], first[0], strict=True):
        p.data.copy_(q.data)
    second[1].load_state_dict(through(first[1].state_dict()))
    steps(first, range(3, 4))  # the checkpoint is a copy
    steps(second, range(3, 13))
    assert all(map(torch.equal, bits(second), bits(whole)))
    assert len(bits(second)) == len(bits(whole)) == 4 + 3 * 5


def test_a_copy_goes_on_by_itself() -> None:
    model = build()
    steps(model, range(3))
    twin = copy.deepcopy(model)
    steps(model, range(3, 5))
    before = [t.clone() for t in bits(model)]
    steps(twin, range(3, 5))
    assert all(map(torch.equal, bits(twin), before)) and all(map(torch.equal, bits(model), before))


def test_a_learning_rate_on_the_device_stays_that_tensor() -> None:
    model, other = build(), build()
    steps(other, range(1))
    other[1].param_groups[1]["lr"].fill_(0.5)
    rate = model[1].param_groups[1]["lr"]
    model[1].load_state_dict(through_pickle(other[1].state_dict()))
    assert model[1].param_groups[1]["lr"] is rate and rate == 0.5


@pytest.mark.parametrize(
    ("codec", "says"),
    [
        (Blockwise(DYNAMIC8, 512), "blocks of 256', here as .*blocks of 512"),
        (Blockwise(E4M3), "dynamic8 .* here as 'blockwise v1, e4m3"),
        (Blockwise(Codebook("dynamic8", DYNAMIC8.points[:255] + (1.5,))), "dynamic8 (.*), .*dynamic8 (?!\\1)"),
        (Exact(), "here as 'float32'"),
    ],
    ids=str,
)
def test_other_blocks_or_books_are_refused(codec: Any, says: str) -> None:
    p = nn.Parameter(torch.ones(1, 256))
    saved, other = (AdamW([p], first=first) for first in (Blockwise(DYNAMIC8), codec))
    with pytest.raises(CheckpointError, match=f"the first moment of group 0 is stored as .*{says}"):
        other.load_state_dict(saved.state_dict())


def test_other_groups_are_refused() -> None:
    (params, optimizer), p = build(), nn.Parameter(torch.ones(1))
    with pytest.raises(CheckpointError, match=r"groups have \[3, 1\] parameters, these have \[4\]"):
        AdamW8bit([*params[:3], p]).load_state_dict(optimizer.state_dict())


def test_an_interrupted_load_changes_nothing() -> None:
    model, torn = build(), build()
    for one in (model, torn):
        steps(one, range(3))
    before = [t.clone() for t in bits(model)]
    state = torn[1].state_dict()
    state["state"][3] = {k: v for k, v in state["state"][3].items() if k != "first.scale"}
    state["state"][0] = {k: v + 1 for k, v in state["state"][0].items()}
    with pytest.raises(CheckpointError, match="first moment of parameter 3"):
        model[1].load_state_dict(state)
    assert all(map(torch.equal, bits(model), before))


def test_the_report_measures_what_is_stored() -> None:
    model = build()
    before = state_report(model[1])
    steps(model, range(3))
    report = state_report(model[1])
    assert before == report and report.bytes == sum(
        t.nbytes for p in model[0] for name, t in model[1].state.get(p, {}).items() if name != "step"
    )
    # 8 bits: codes, and a scale for 256 elements begun; 4 bits: two codes to a byte, and a scale for 128.
    assert [row.bytes for row in report.moments] == [1024 + 16] * 2 + [300 + 8] * 2 + [192 + 12] * 2
    small = state_report(AdamW8bit([nn.Parameter(torch.ones(9))]))
    assert {row.reason for row in small.moments} == {"fewer than 4096 elements"} and "36 bytes (fewer" in str(small)


def test_the_signed_and_the_unsigned_book_are_told_apart() -> None:
    assert Blockwise(DYNAMIC8).layout != Blockwise(UDYNAMIC8).layout.replace("udynamic8", "dynamic8")
