# SPDX-License-Identifier: Apache-2.0
"""Kept layers and phases in a run: what is trained when, what the log says, and a resume in the middle of a phase."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowbits.errors import CheckpointError, ConversionError, RunError, ShapeError
from lowbits.formats import INT8
from lowbits.nn import Gemm, Keep, Phase, Recipe
from lowbits.quantizers import AbsMean, PerGroup, QuantSpec
from lowbits.recipes import named
from lowbits.train import Autocast, Compute, Device, Watching, checkpoints, train
from tests.train import tiny
from tests.train.tiny import STOCHASTIC, log_lines, state_bytes, tiny_run

OFF = {"forward": False, "backward": False}
# A start in high precision, then all in few bits, then the forward pass back.
THREE = (Phase(0, **OFF), Phase(3), Phase(0.75, forward=False))


def lines(out: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in log_lines(out) if line["kind"] == kind]


def weights(out: Path, step: int) -> bytes:
    return (out / f"checkpoints/step-{step:08d}/model.safetensors").read_bytes()


def test_the_log_says_when_a_phase_begins_and_losses_are_of_what_is_trained(tiny_tokens: Path, tmp_path: Path) -> None:
    watching = Watching(log_every=1, eval_every=1, eval_batches=1, errors_every=1)
    train(tiny_run(tiny_tokens, recipe="w8a8g8", phases=THREE, watching=watching), tmp_path)
    events = [(line["step"], line["message"]) for line in lines(tmp_path, "event") if line["event"] == "phase"]
    assert events == [
        (1, "forward in high precision, backward in high precision, from this step on"),
        (4, "forward quantized, backward quantized, from this step on"),
        (10, "forward in high precision, backward quantized, from this step on"),
    ]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["phases"][2] == {"start": 0.75, "forward": False, "backward": True}
    # With the forward pass in high precision, quantizers on and off are the same model.
    same = {line["step"]: line["loss_on"] == line["loss_off"] for line in lines(tmp_path, "eval")}
    assert [step for step in same if not same[step]] == list(range(4, 10))
    measured = {line["step"]: line["layers"]["transformer.h.0.attn.c_attn"] for line in lines(tmp_path, "errors")}
    found = {step: [role for role in ("input", "weight", "grad") if roles[role]] for step, roles in measured.items()}
    assert found == {step: ["input", "weight", "grad"] if step < 10 else ["grad"] for step in range(4, 13)}


def test_high_precision_until_a_step_is_the_bf16_run_until_then(tiny_tokens: Path, tmp_path: Path) -> None:
    run = tiny_run(tiny_tokens, recipe="w8a8g8", phases=(Phase(0, **OFF), Phase(8)))
    train(replace(run, saving=replace(run.saving, keep=9)), tmp_path / "late")
    train(replace(run, saving=replace(run.saving, keep=9), recipe="bf16", phases=()), tmp_path / "bf16")
    assert [weights(tmp_path / "late", step) == weights(tmp_path / "bf16", step) for step in (4, 8, 12)] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("at", [4, 8])
def test_a_resumed_run_is_in_the_right_phase_bit_for_bit(tiny_tokens: Path, tmp_path: Path, at: int) -> None:
    """Checkpoints at 4 and 8: amid the second phase, and at its very end (the third begins with the next step)."""
    run = tiny_run(tiny_tokens, recipe=STOCHASTIC, phases=(*THREE[:2], Phase(8, forward=False)))
    run = replace(run, saving=replace(run.saving, keep=9))
    train(run, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut/result.json").unlink()
    for checkpoint in checkpoints(tmp_path / "cut/checkpoints"):
        if int(checkpoint.name.removeprefix("step-")) > at:
            shutil.rmtree(checkpoint)
    train(run, tmp_path / "cut", resume=True)
    assert state_bytes(tmp_path / "cut") == state_bytes(tmp_path / "whole")
    assert log_lines(tmp_path / "cut") == log_lines(tmp_path / "whole")


def test_other_phases_are_another_run_and_older_runs_had_none(tiny_tokens: Path, tmp_path: Path) -> None:
    run = tiny_run(tiny_tokens, steps=2)
    train(run, tmp_path)
    with pytest.raises(CheckpointError, match=r"its phases is \[\], asked for is \[\{'start': 1, "):
        train(replace(run, phases=(Phase(1, forward=False),)), tmp_path, resume=True)
    with pytest.raises(CheckpointError, match=r"its keep\.last is 0, asked for is 1"):
        train(replace(run, keep=Keep(last=1)), tmp_path, resume=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["phases"], config["keep"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert train(run, tmp_path, resume=True)["status"] == "finished"
    with pytest.raises(CheckpointError, match=r"its keep\.last is 0, asked for is 1"):
        train(replace(run, keep=Keep(last=1)), tmp_path, resume=True)


def test_every_phase_is_rehearsed_before_anything_is_written(tiny_tokens: Path, tmp_path: Path) -> None:
    """A backward pass that cannot work shows itself at once, not when its phase begins."""
    broken = Recipe(wgrad=Gemm(QuantSpec(INT8, PerGroup(48), AbsMean()), None))
    run = tiny_run(tiny_tokens, recipe=broken, phases=(Phase(0, **OFF), Phase(0.5)))
    with pytest.raises(ShapeError, match=r"wgrad\.lhs"):
        train(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_kept_layers_compose_with_head_qkv_and_a_choice_of_ones_own(tiny_tokens: Path, tmp_path: Path) -> None:
    keep = Keep(last=1, names=("*.0.mlp.c_proj",))
    base = tiny_run(tiny_tokens, recipe="w8a8g8", steps=1, keep=keep)

    def converted(name: str, **changes: Any) -> int:
        count = train(replace(base, **changes), tmp_path / name)["converted_layers"]
        assert isinstance(count, int)
        return count

    assert converted("plain") == 3
    assert converted("head", quantize_head=True, split_qkv=True) == 4
    assert converted("kept head", quantize_head=True, keep=Keep(names=("lm_head",))) == 8
    assert converted("choice", layers=one_layer, keep=Keep(last=1)) == 1
    with pytest.raises(ConversionError, match=r"`keep` \(\*\.0\.\*\) and `choose` leave none"):
        converted("nothing", layers=one_layer, keep=Keep(names=("*.0.*",)))
    with pytest.raises(RunError, match="split-qkv"):
        converted("no qkv", split_qkv=True, keep=Keep(names=("*.c_attn",)))


def one_layer(name: str, module: nn.Module) -> Recipe | None:
    return named("w8a8") if name == "transformer.h.0.mlp.c_fc" else None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler imports deprecated parts of torch and reads .grad of non-leaves
def test_a_compiled_run_recompiles_once_a_phase(tiny_tokens: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compute = Compute(device=Device.CPU, autocast=Autocast.NONE, compile=True)
    watching = Watching(log_every=1, eval_every=12, eval_batches=1, errors_every=0)
    run = tiny_run(tiny_tokens, model=quiet_model, recipe="w8a8g8", compute=compute, watching=watching, phases=THREE)
    result = train(run, tmp_path / "compiled")
    train(replace(run, compute=replace(compute, compile=False)), tmp_path / "eager")
    # A graph a phase for training; two for the evaluation at the end, in the third phase, on and off.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3 + 2
    assert result["status"] == "finished"
    pairs = zip(lines(tmp_path / "compiled", "step"), lines(tmp_path / "eager", "step"), strict=True)
    assert all(abs(a["loss"] - b["loss"]) < 1e-2 for a, b in pairs)


def quiet_model(vocab_size: int, block: int) -> nn.Module:
    """Without dropout, whose draws differ in a compiled graph."""
    return tiny.model(vocab_size, block, dropout=0.0)
