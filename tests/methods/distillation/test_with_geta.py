# SPDX-License-Identifier: Apache-2.0
"""Distillation beside pruning: a teacher in GETA's loop, and groups that survive a cut."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lowbits.export import load_coded, save_coded
from lowbits.methods import geta
from lowbits.methods.distillation import (
    Levels,
    Mixing,
    Teacher,
    coded_model,
    distillation_loss,
    quantize_weights_,
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
    dense = geta.dense_cost(graph)
    assert geta.cost(small, (x[:2],)).parameters < 0.6 * dense.parameters
    agreement = (small(x).argmax(1) == teacher(x).argmax(1)).double().mean().item()
    assert agreement > 0.8 and all(p.grad is None for p in teacher.model.parameters())


def test_a_pruned_model_is_distilled_into_few_bits_and_one_file(tmp_path: Path) -> None:
    """Prune first, form the groups of what is left, store once."""
    torch.manual_seed(0)
    ids = torch.randint(0, 32, (8, 16))
    dense = GPT2LMHeadModel(GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=0, resid_pdrop=0,
        embd_pdrop=0, attn_pdrop=0,
    ))  # fmt: skip
    fit(dense, torch.optim.Adam(dense.parameters(), 1e-2), lambda m: m(ids, labels=ids).loss)
    teacher = Teacher(copy.deepcopy(dense))
    graph = geta.trace(dense, (), {"input_ids": ids[:2], "use_cache": False})
    geta.quantize_(dense)
    keep = torch.cat([torch.arange(d.size) < (d.size // 2 if d.size == 64 else d.size) for d in graph.dimensions])
    geta.save_pretrained(geta.construct(graph, dense, keep), graph, dense, keep, tmp_path / "small")
    small, again = (GPT2LMHeadModel.from_pretrained(tmp_path / "small") for _ in range(2))
    assert small.config.n_inner == 32
    quantize_weights_(small, Levels.of_bits(2, PerGroup(16)))

    def loss(model: nn.Module) -> torch.Tensor:
        return distillation_loss(model(ids).logits[:, :-1], teacher(ids)[:, :-1], ids[:, 1:])

    before = loss(small).item()
    fit(small, torch.optim.Adam(small.parameters(), 1e-2), loss)
    assert loss(small).item() < 0.7 * before
    save_coded(tmp_path / "small.safetensors", coded_model(small))
    again.load_state_dict(load_coded(tmp_path / "small.safetensors").state_dict())
    assert torch.equal(again.eval()(ids).logits, small.eval()(ids).logits)


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
