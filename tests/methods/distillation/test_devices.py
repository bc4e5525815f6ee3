# SPDX-License-Identifier: Apache-2.0
"""The whole way of a student on a device: taught, cached, learned points, stored, and read back bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from lowbits.export import load_coded, save_coded
from lowbits.methods.differentiable_quantization import gradient_norms, learn_points_, point_parameters, redistribute
from lowbits.methods.distillation import (
    CacheSettings,
    Levels,
    Mixing,
    Teacher,
    TeacherCache,
    TopK,
    coded_model,
    content_keys,
    distillation_loss,
    quantize_weights_,
    set_draw_,
)
from lowbits.optim import AdamW8bit
from lowbits.quantizers import PerBlock, PerGroup, PerRow, PerTensor, Rounding
from tests.methods.distillation.test_weight_views import gpt2

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]


def moved(top: TopK, device: str) -> TopK:
    return TopK(top.log_probs.to(device), top.classes.to(device), top.rest.to(device), top.num_classes, top.temperature)


def stored(model: nn.Module, ids: torch.Tensor, path: Path) -> None:
    """What is read from the file computes what the model in evaluation does."""
    save_coded(path, coded_model(model))
    plain = gpt2().to(ids.device)
    plain.load_state_dict(load_coded(path).state_dict())
    with torch.no_grad():
        assert torch.equal(plain.eval()(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("buckets", [PerBlock(32), PerGroup(8), PerRow(), PerTensor()], ids=str)
def test_a_student_is_taught_and_stored_where_it_is(device: str, buckets: PerBlock, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 32, (4, 16), device=device)
    student, teacher = gpt2().to(device), Teacher(gpt2().bfloat16()).to(device)
    quantize_weights_(student, Levels(6, buckets, Rounding.STOCHASTIC))
    cache, keys = TeacherCache.create(tmp_path / "cache", CacheSettings("big", 32, 8)), content_keys(ids)
    cache.append(keys, teacher(ids)[:, :-1])
    optimizer = AdamW8bit(student.parameters(), lr=1e-2, min_8bit_size=64)
    losses = []
    for step in range(10):
        set_draw_(student, step)
        with torch.autocast(device, torch.bfloat16):
            logits = student(ids).logits[:, :-1]
        loss = distillation_loss(logits, moved(cache.read(keys), device), ids[:, 1:], Mixing(temperature=1.0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    stored(student, ids, tmp_path / "levels.safetensors")


@pytest.mark.parametrize("device", DEVICES)
def test_points_are_learned_and_stored_where_they_are(device: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 32, (4, 16), device=device)
    student = gpt2().to(device)
    teacher = Teacher(copy.deepcopy(student))
    learn_points_(student, Levels(4, PerBlock(32)))

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return distillation_loss(model(batch).logits, teacher(batch), batch, Mixing(1.0, 1.0))

    norms = gradient_norms(student, loss, [ids, ids.flip(0)])
    learn_points_(student, Levels(4, PerBlock(32)), counts=redistribute(dict.fromkeys(norms, 4), norms))
    optimizer = torch.optim.Adam(point_parameters(student).values(), 1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        found = loss(student, ids)
        found.backward()
        optimizer.step()
        losses.append(found.item())
    assert losses[-1] < losses[0]
    stored(student, ids, tmp_path / "points.safetensors")
