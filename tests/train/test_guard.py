# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowbits.train import Curve, Schedule, train
from lowbits.train._guard import judge, spike_limit
from lowbits.train._state import Progress
from tests.train.tiny import log_lines, model, state_bytes, tiny_run


def _poisoned(path: str, role: str) -> Any:
    """A model factory in whose layer `path` the weight, the output or the gradient is not finite."""

    def factory(vocab_size: int, block: int) -> nn.Module:
        made = model(vocab_size, block)
        layer = made.get_submodule(path)
        if role == "weight":
            with torch.no_grad():
                layer.weight[0, 0] = math.nan  # type: ignore[index]
        elif role == "output":
            layer.register_forward_hook(lambda _m, _i, y: y / 0.0)
        else:
            layer.register_forward_hook(lambda _m, _i, y: _spoil_gradient(y))
        return made

    return factory


def _spoil_gradient(y: Tensor) -> Tensor:
    if y.requires_grad:
        y.register_hook(lambda g: g * math.inf)
    return y


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("transformer.h.1.mlp.c_fc", "weight"),
        ("transformer.h.0.ln_2", "output"),
        ("transformer.h.1.attn.c_proj", "gradient"),
    ],
)
def test_the_layer_and_role_that_first_failed(tiny_tokens: Path, tmp_path: Path, path: str, role: str) -> None:
    result = train(tiny_run(tiny_tokens, model=_poisoned(path, role)), tmp_path)
    assert (result["status"], result["diverged_at"], result["skipped_steps"]) == ("diverged", 3, 3)
    assert (result["diverged_layer"], result["diverged_role"]) == (path, role)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    events = [line["event"] for line in log_lines(tmp_path) if line["kind"] == "event"]
    assert events == ["skipped", "skipped", "skipped", "diverged"]
    assert all(line["grad_norm"] is None for line in log_lines(tmp_path) if line["kind"] == "step")


def test_one_bad_step_is_skipped_and_counted(tiny_tokens: Path, tmp_path: Path) -> None:
    """The last of two steps has an infinite loss: the weights stay those of a run of one step's updates."""

    def factory(vocab_size: int, block: int) -> nn.Module:
        made, calls = model(vocab_size, block), 0

        def hook(module: nn.Module, _: object, y: Tensor) -> Tensor:
            nonlocal calls
            calls += module.training and torch.is_grad_enabled()
            return y * math.inf if calls == 4 and module.training else y  # the last micro-batch of the second step

        made.transformer.h[1].register_forward_hook(hook)  # type: ignore[union-attr, index]
        return made

    one, two = tmp_path / "one", tmp_path / "two"
    run = tiny_run(tiny_tokens, model=factory, steps=2)
    constant = replace(run, schedule=Schedule(curve=Curve.CONSTANT, warmup=0.0))
    train(replace(constant, steps=1), one)
    result = train(constant, two)
    assert (result["status"], result["skipped_steps"]) == ("finished", 1)
    assert state_bytes(one)["model.safetensors"] == state_bytes(two)["model.safetensors"]
    assert [line["message"] for line in log_lines(two) if line["kind"] == "event"] == [
        "non-finite loss, step skipped (1 in a row); the batch is finite when run again"
    ]


def test_spikes_by_the_documented_rule() -> None:
    progress = Progress()
    calm = [3.0 + 0.01 * (-1) ** step for step in range(32)]
    assert not any(judge(progress, loss, 1.0) for loss in calm)
    assert spike_limit(progress.recent) == pytest.approx(3.0 + 0.2, abs=0.011)  # the floor of 0.2 nats decides
    assert not judge(progress, 3.15, 1.0)
    (event,) = judge(progress, 3.5, 1.0)
    assert (event.event, progress.spikes, len(progress.recent)) == ("spike", 1, 32)
    noisy = [3.0 + 0.1 * step for step in range(-16, 16)]  # median 2.95, median deviation 0.8
    assert spike_limit(noisy) == pytest.approx(2.95 + 6 * 1.4826 * 0.8)
    assert spike_limit(calm[:15]) == math.inf


def test_a_streak_ends_with_a_good_step() -> None:
    progress = Progress()
    for loss, norm, streak in ((math.nan, 1.0, 1), (3.0, math.inf, 2), (3.0, 1.0, 0), (math.inf, 1.0, 1)):
        judge(progress, loss, norm)
        assert progress.streak == streak
    assert progress.skipped == 3
