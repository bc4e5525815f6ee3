# SPDX-License-Identifier: Apache-2.0
"""A teacher never changes, and one that does not fit is named before it is read."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
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


def test_the_optimizer_beside_a_teacher_takes_no_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of `lowbits train` holds its moments, too."""
    save_file({"first": torch.zeros(1_000_000)}, folder / "optimizer.safetensors")
    monkeypatch.setattr(_teacher, "free_memory", lambda _: 100_000)
    assert load_teacher(folder).num_bytes < 100_000


def test_a_teacher_in_several_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_teacher(folder, torch.float32)
    whole.model.save_pretrained(tmp_path / "parts", max_shard_size="2KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 1
    assert load_teacher(tmp_path / "parts", torch.float32).fingerprint == whole.fingerprint
    monkeypatch.setattr(_teacher, "free_memory", lambda _: 2000)
    with pytest.raises(RunError, match="GiB are free"):
        load_teacher(tmp_path / "parts")
    index = tmp_path / "parts" / "model.safetensors.index.json"
    index.write_text(index.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        load_teacher(tmp_path / "parts")


def test_folders_that_are_no_teacher(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_teacher(tmp_path / "none")
    path = folder / "model.safetensors"
    whole = load_file(path)
    save_file({name: tensor for name, tensor in whole.items() if "c_fc" not in name}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 2 tensors, the first is transformer\.h\.0\.mlp\.c_fc\.bias"):
        load_teacher(folder)
    config = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(config[:-20], encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_teacher(folder)
    (folder / "config.json").write_text(config, encoding="utf-8")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="is torn"):
        load_teacher(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_teacher(folder)
