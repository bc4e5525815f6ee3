# SPDX-License-Identifier: Apache-2.0
"""A teacher never changes, and one that does not fit is named before it is read."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lowbits.errors import CheckpointError, RunError, ShapeError
from lowbits.methods import _teacher
from lowbits.methods.distillation import Teacher, distillation_loss, free_memory, load_teacher


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16, n_positions=8, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_a_teacher_has_no_gradients_and_never_changes() -> None:
    big, student, x = net(), net(), torch.randn(5, 6)
    teacher = Teacher(big.train())
    before = copy.deepcopy(big.state_dict())
    for _ in range(3):
        big.train()  # somebody's mistake
        logits = teacher(x)
        assert not logits.requires_grad and not any(m.training for m in big.modules())
        distillation_loss(student(x), logits, torch.zeros(5, dtype=torch.int64)).backward()
    assert all(torch.equal(value, before[key]) for key, value in big.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in big.parameters())
    assert not isinstance(teacher, nn.Module) and teacher.num_bytes == sum(t.nbytes for t in before.values())


def test_a_transformers_folder_is_a_teacher_in_its_own_precision(folder: Path) -> None:
    teacher = load_teacher(folder)
    logits = teacher(input_ids=torch.arange(8)[None])
    assert logits.dtype == torch.bfloat16 and logits.shape == (1, 8, 16)
    assert load_teacher(folder, torch.float32)(input_ids=torch.arange(8)[None]).dtype == torch.float32
    teacher.check_vocabulary(16)
    with pytest.raises(ShapeError, match="teacher's vocabulary has 16 entries, the student's 17"):
        teacher.check_vocabulary(17)


def test_a_teacher_larger_than_the_memory_is_refused_unread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_memory(torch.device("cpu")) > 0
    monkeypatch.setattr(_teacher, "free_memory", lambda _: 1000)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("was read"))
    with pytest.raises(RunError, match="GiB are free.*TeacherCache on a machine where it fits"):
        load_teacher(folder)


def test_folders_that_are_no_teacher(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no config.json"):
        load_teacher(tmp_path / "none")
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="is torn"):
        load_teacher(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="no safetensors files"):
        load_teacher(folder)
