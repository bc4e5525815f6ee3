# SPDX-License-Identifier: Apache-2.0
"""Distillation beside pruning: a teacher in GETA's loop, and groups that survive a cut."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lowbits.methods import geta
from lowbits.methods.distillation import (
    Levels,
    Mixing,
    Teacher,
    distillation_loss,
    round_to_levels,
)
from lowbits.quantizers import PerGroup

STEPS = 60


def test_the_dense_network_teaches_while_it_is_pruned_and_quantized() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 12)
    y = (x @ torch.randn(12, 5)).argmax(1)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 5))
    fit(model, torch.optim.Adam(model.parameters(), 1e-2), lambda m: nn.functional.cross_entropy(m(x), y))
    teacher = Teacher(copy.deepcopy(model))
    mixing = Mixing(temperature=2.0)

    def mixed(student: nn.Module) -> torch.Tensor:
        return distillation_loss(student(x), teacher(x), y, mixing)

    graph = geta.trace(model, (x[:2],))
    geta.quantize_(model)
    qasso = geta.Qasso(model, graph, geta.Target(0.5, 4, 8), geta.Schedule.of(STEPS))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    qasso.attach(optimizer)
    fit(model, optimizer, mixed)
    small = geta.construct(graph, model, qasso.keep)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in teacher.model.parameters())
    agreement = (small(x).argmax(1) == teacher(x).argmax(1)).double().mean().item()
    assert agreement > 0.8 and all(p.grad is None for p in teacher.model.parameters())


def test_row_groups_are_the_same_before_and_after_rows_are_cut() -> None:
    """Why `PerGroup` goes with pruning: a flattened bucket behind a cut row would begin somewhere else."""
    w, kept = torch.randn(8, 40), torch.tensor([0, 3, 4, 7])
    levels = Levels.of_bits(2, PerGroup(16))
    assert torch.equal(round_to_levels(w[kept], levels), round_to_levels(w, levels)[kept])
    flat = Levels.of_bits(2)
    assert not torch.equal(round_to_levels(w[kept], flat), round_to_levels(w, flat)[kept])


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, loss) -> None:
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
