# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbits.errors import CheckpointError, RunError
from lowbits.formats import UDYNAMIC8
from lowbits.optim import AdamW, Blockwise
from lowbits.train import checkpoints, newest_intact, train, verify
from lowbits.train._checkpoint import write_checkpoint
from lowbits.train._state import LAYOUTS, OPTIMIZER, _layouts, _load_optimizer_
from tests.train.tiny import STOCHASTIC, tiny_run


def _fill(folder: Path) -> None:
    (folder / "weights").write_bytes(b"0123456789")


def test_the_last_k_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        write_checkpoint(tmp_path, step, _fill, keep=2)
    assert [path.name for path in tmp_path.iterdir()] != []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]
    for checkpoint in checkpoints(tmp_path):
        verify(checkpoint)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "weights").write_bytes(b"01234"), "weights is truncated, 5 of 10 bytes"),
        (lambda path: (path / "weights").write_bytes(b"0123456780"), "weights was altered"),
        (lambda path: (path / "weights").unlink(), "weights is missing"),
        (lambda path: (path / "MANIFEST.json").unlink(), "MANIFEST.json is missing"),
        (lambda path: (path / "MANIFEST.json").write_text('{"files": {'), "MANIFEST.json is missing or unreadable"),
    ],
)
def test_every_kind_of_damage_is_named(tmp_path: Path, damage: object, words: str) -> None:
    older, newer = (write_checkpoint(tmp_path, step, _fill, keep=2) for step in (1, 2))
    assert callable(damage)
    damage(newer)
    with pytest.raises(CheckpointError, match=words):
        verify(newer)
    found, complaints = newest_intact(tmp_path)
    assert found == older and len(complaints) == 1


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left (os error 28)")],
)
def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path, error: Exception) -> None:
    older = write_checkpoint(tmp_path, 1, _fill, keep=1)

    def fails(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise error

    with pytest.raises(
        RunError, match="the disk is full.*checkpoint step-00000001 is intact; free some space"
    ) as raised:
        write_checkpoint(tmp_path, 2, fails, keep=1)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == [older]
    verify(older)


def test_a_disk_that_fills_up_during_a_run(tiny_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second checkpoint meets a full disk; after some space was freed the run goes on."""
    run, real, calls = tiny_run(tiny_tokens), os.fsync, 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if (
            len(checkpoints(tmp_path / "checkpoints")) == 1
            and (tmp_path / "checkpoints/.step-00000008.partial").exists()
        ):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="step-00000004 is intact"):
        train(run, tmp_path)
    monkeypatch.setattr(os, "fsync", real)
    assert train(run, tmp_path, resume=True)["status"] == "finished"


def test_transformers_loads_a_checkpoint_and_codes_stay_codes(tiny_tokens: Path, tmp_path: Path) -> None:
    run = tiny_run(tiny_tokens, recipe=STOCHASTIC, steps=2)
    result = train(run, tmp_path)
    (checkpoint,) = checkpoints(tmp_path / "checkpoints")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert sum(p.numel() for p in model.parameters()) == result["parameters"]
    ids = tokenizer("import json", return_tensors="pt").input_ids
    assert model(ids).logits.isfinite().all()
    state = load_file(checkpoint / "optimizer.safetensors")
    weight = "transformer.h.0.mlp.c_fc.weight"
    for moment in ("first", "second"):
        assert state[f"{weight}:{moment}.codes"].dtype == torch.uint8
        assert state[f"{weight}:{moment}.codes"].numel() == 32 * 128
    assert state["transformer.wte.weight:first.value"].dtype == torch.float32
    names = {path.name for path in checkpoint.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "trainer.json", "MANIFEST.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)


def test_another_architecture_is_refused(tiny_tokens: Path, tmp_path: Path) -> None:
    """A checkpoint of a wider model, put where this run expects its own; its trainer.json says nothing of the width."""
    run = tiny_run(tiny_tokens, steps=4)
    train(run, tmp_path / "narrow")
    train(tiny_run(tiny_tokens, steps=4, model="gpt2-nano"), tmp_path / "wide")
    for name in ("narrow", "wide"):
        (tmp_path / name / "result.json").unlink()
    trainer = tmp_path / "narrow/checkpoints/step-00000004/trainer.json"
    mine, theirs = json.loads(trainer.read_text()), tmp_path / "wide/checkpoints/step-00000004"
    (tmp_path / "narrow/checkpoints").rename(tmp_path / "kept")
    theirs.parent.rename(tmp_path / "narrow/checkpoints")
    with pytest.raises(CheckpointError, match=r"belongs to another run: its model is 'gpt2-nano'"):
        train(run, tmp_path / "narrow", resume=True)
    stranger = tmp_path / "narrow/checkpoints/step-00000004"

    def fill(folder: Path) -> None:
        for path in stranger.iterdir():
            if path.name != "MANIFEST.json":
                (folder / path.name).write_bytes(path.read_bytes())
        (folder / "trainer.json").write_text(json.dumps(mine))

    write_checkpoint(tmp_path / "narrow/checkpoints", 5, fill, keep=1)
    with pytest.raises(CheckpointError, match="is of another architecture") as raised:
        train(run, tmp_path / "narrow", resume=True)
    assert "\n" not in str(raised.value)


def test_moments_that_are_stored_in_another_way_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(16, 16)
    theirs, ours = (AdamW(model.parameters(), second=Blockwise(UDYNAMIC8, size)) for size in (128, 256))
    save_file({}, tmp_path / OPTIMIZER, metadata={LAYOUTS: json.dumps(_layouts(theirs))})
    _load_optimizer_(tmp_path, model, theirs, {})
    with pytest.raises(CheckpointError, match="group 0, second is stored as .*blocks of 128', .*blocks of 256'"):
        _load_optimizer_(tmp_path, model, ours, {})
