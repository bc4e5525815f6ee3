# SPDX-License-Identifier: Apache-2.0
"""A training step under torch.compile: the model is compiled, the update is left to the optimizer's own launches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lowbits.optim import AdamW8bit, GlobalNorm


def train(compile_: Callable[[Callable], Callable]) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    optimizer = AdamW8bit(model.parameters(), lr=1e-2, clip=GlobalNorm(0.1))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
    x = torch.randn(8, 64)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step = compile_(step)
    for _ in range(4):
        step()
        schedule.step()
    return [*(p.detach() for p in model.parameters()), *optimizer.state[model[0].weight].values()]


def test_a_compiled_training_step_comes_to_the_same_bits() -> None:
    compiled = train(lambda step: torch.compile(step, backend="eager"))  # traced, not translated: seconds less
    plain = train(lambda step: step)
    assert len(plain) == 9 and all(map(torch.equal, compiled, plain))
