# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lowbits import models
from lowbits.data import TokenData
from lowbits.errors import DataError, RunError, ShapeError
from lowbits.formats import INT8
from lowbits.nn import Gemm, Recipe
from lowbits.quantizers import AbsMean, PerGroup, QuantSpec
from lowbits.train import Autocast, Compute, Device, Run, Watching, _loop, checkpoints, train
from lowbits.train._determinism import determinism
from lowbits.train._world import World
from tests.train import tiny
from tests.train.tiny import STOCHASTIC, log_lines, state_bytes, tiny_run

# Written by hand from docs/architecture.md.
LINES = {
    "step": "kind step tokens seconds loss lr grad_norm tokens_per_second memory_bytes",
    "eval": "kind step tokens seconds loss_on loss_off",
    "errors": "kind step layers",
}
RESULT = (
    "status recipe method seed steps tokens seconds val_loss_on val_loss_off train_loss tokens_per_second execution "
    "parameters converted_layers linear_flops_share skipped_steps spikes peak_memory_bytes memory sample tables "
    "diverged_at diverged_layer diverged_role"
)


def plain_model(vocab_size: int, block: int) -> nn.Module:
    """Without dropout, whose draws depend on how a batch is cut."""
    return tiny.model(vocab_size, block, dropout=0.0)


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in log_lines(out) if line["kind"] == "step"]


def test_a_run_leaves_what_the_contract_says(tiny_tokens: Path, tmp_path: Path) -> None:
    run = tiny_run(tiny_tokens, steps=12)
    result = train(run, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for kind, keys in LINES.items():
        assert {" ".join(line) for line in lines if line["kind"] == kind} == {keys}
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 13))
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [4, 8, 12]
    (errors, _) = [line for line in lines if line["kind"] == "errors"]
    layer = errors["layers"]["transformer.h.0.attn.c_attn"]
    assert list(layer) == ["input", "weight", "grad"]
    assert 30 < layer["input"]["sqnr_db"] < 60 and layer["grad"] == {}  # w8a8 leaves gradients alone
    assert " ".join(result) == RESULT
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert json.loads((tmp_path / "config.json").read_text())["recipe"] == "w8a8"
    assert json.loads((tmp_path / "env.json").read_text())["versions"]["torch"] == torch.__version__
    assert (result["tokens"], result["converted_layers"], result["execution"]) == (12 * 4 * 32, 8, "simulated")
    assert list(result["memory"]["measured"]) == ["weights", "gradients", "optimizer", "saved_activations"]  # type: ignore[index]
    assert result["sample"] and losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.5


def test_quantizers_off_is_another_loss_only_where_there_are_quantizers(tiny_tokens: Path, tmp_path: Path) -> None:
    for recipe, differ in (("bf16", False), ("m8_channel", False), ("w4_tensor", True)):
        result = train(tiny_run(tiny_tokens, recipe=recipe, steps=2), tmp_path / recipe)
        assert (result["val_loss_on"] != result["val_loss_off"]) == differ
        assert any(line["kind"] == "errors" for line in log_lines(tmp_path / recipe)) is False  # every 6 steps


@pytest.mark.parametrize("changes", [{"accumulation": 1}, {"accumulation": 4}])
def test_accumulation_changes_nothing_but_rounding(tiny_tokens: Path, tmp_path: Path, changes: dict[str, int]) -> None:
    run = tiny_run(tiny_tokens, model=plain_model, recipe="bf16", steps=4, accumulation=2)
    train(run, tmp_path / "two")
    train(replace(run, **changes), tmp_path / "other")
    # float32 sums in another order, 24 bits each, over four steps of lr 1e-2.
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "two"), abs=2e-4)


def test_gradient_checkpointing_recomputes_the_same_bits(tiny_tokens: Path, tmp_path: Path) -> None:
    """Dropout and stochastic rounding included: both streams are functions of the position."""
    run = tiny_run(tiny_tokens, recipe=STOCHASTIC, steps=3)
    train(run, tmp_path / "kept")
    again = replace(run, compute=replace(run.compute, gradient_checkpointing=True))
    train(again, tmp_path / "recomputed")
    assert losses(tmp_path / "kept") == losses(tmp_path / "recomputed")
    assert state_bytes(tmp_path / "kept") == state_bytes(tmp_path / "recomputed")


def test_bf16_autocast_rounds_activations_and_keeps_float32_weights(tiny_tokens: Path, tmp_path: Path) -> None:
    run = tiny_run(tiny_tokens, model=plain_model, steps=3)
    result = train(run, tmp_path / "float32")
    half = train(replace(run, compute=Compute(device=Device.CPU, autocast=Autocast.BF16)), tmp_path / "bf16")
    first, second = losses(tmp_path / "float32")[0], losses(tmp_path / "bf16")[0]
    # bf16 keeps 8 bits: a logit below 1 is off by at most 2^-9 in each of a few roundings, the mean loss by less.
    assert first != second and first == pytest.approx(second, abs=0.01)
    weights = [r["memory"]["measured"]["weights"] for r in (result, half)]  # type: ignore[index]
    assert weights[0] == weights[1] == 4 * result["parameters"]  # type: ignore[operator]


def test_a_trained_folder_is_a_model(tiny_tokens: Path, tmp_path: Path) -> None:
    """Continuing from a checkpoint as from any Hugging Face folder begins at its loss."""
    first = train(tiny_run(tiny_tokens, model="gpt2-nano", recipe="bf16"), tmp_path / "first")
    (folder,) = checkpoints(tmp_path / "first/checkpoints")[-1:]
    still = tiny_run(tiny_tokens, model=str(folder), recipe="bf16", steps=1)
    second = train(replace(still, optimizer=replace(still.optimizer, lr=0.0)), tmp_path / "second")
    assert second["val_loss_on"] == pytest.approx(first["val_loss_on"], abs=1e-6)


def test_user_code_chooses_layer_by_layer(tiny_tokens: Path, tmp_path: Path) -> None:
    def only_mlp(name: str, module: nn.Module) -> Recipe | None:
        return Recipe(fprop=Gemm(None, QuantSpec(INT8))) if ".mlp." in name else None

    result = train(tiny_run(tiny_tokens, layers=only_mlp, steps=1), tmp_path / "layers")
    assert result["converted_layers"] == 4
    assert "only_mlp" in json.loads((tmp_path / "layers/config.json").read_text())["layers"]
    head = train(tiny_run(tiny_tokens, quantize_head=True, split_qkv=True, steps=1), tmp_path / "head")
    assert head["converted_layers"] == 9


def test_the_error_monitor_sees_what_the_recipe_quantizes(tiny_tokens: Path, tmp_path: Path) -> None:
    watching = Watching(errors_every=1, eval_every=9, log_every=9)
    train(tiny_run(tiny_tokens, recipe="w8a8g8", split_qkv=True, steps=1, watching=watching), tmp_path / "eight")
    train(tiny_run(tiny_tokens, recipe="g4_tensor", steps=1, watching=watching), tmp_path / "four")
    eight, four = (
        next(line["layers"] for line in log_lines(tmp_path / out) if line["kind"] == "errors")[
            "transformer.h.1.mlp.c_fc"
        ]
        for out in ("eight", "four")
    )
    assert set(eight["grad"]) == {"sqnr_db", "zero", "clipped", "relative_error", "amax", "bias", "nonfinite"}
    assert eight["grad"]["sqnr_db"] > four["grad"]["sqnr_db"] + 10
    assert four["grad"]["zero"] > 0.3 > eight["grad"]["zero"]  # most gradients are tiny (spec R5)
    assert four["input"] == four["weight"] == {}


def test_watching_does_not_touch_the_training(tiny_tokens: Path, tmp_path: Path) -> None:
    run = tiny_run(tiny_tokens, recipe=STOCHASTIC, steps=4)
    train(run, tmp_path / "watched")
    train(replace(run, watching=Watching(log_every=4, eval_every=4, errors_every=0)), tmp_path / "left")
    assert state_bytes(tmp_path / "watched") == state_bytes(tmp_path / "left")


def test_two_processes_train_as_one(tiny_tokens: Path, tmp_path: Path) -> None:
    """DDP over gloo: the same batches, the same losses up to the order of float32 sums; evaluation is shared too."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import replace\nfrom pathlib import Path\n"
        "from tests.train.test_loop import plain_model\nfrom tests.train.tiny import tiny_run\n"
        f"def run():\n    data = Path({str(tiny_tokens)!r})\n"
        "    return tiny_run(data, model=plain_model, recipe='w8_channel', steps=4)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [*command, "-m", "lowbits.cli", "train", str(file), "--out", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one = train(tiny_run(tiny_tokens, model=plain_model, recipe="w8_channel", steps=4), tmp_path / "one")
    two = json.loads((tmp_path / "two/result.json").read_text())
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-4)
    assert two["val_loss_on"] == pytest.approx(one["val_loss_on"], abs=2e-4)
    assert json.loads((tmp_path / "two/env.json").read_text())["processes"] == 2
    assert done.stdout.count("everything is in") == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler imports deprecated parts of torch and reads .grad of non-leaves
def test_compiled_blocks_compute_the_same(tiny_tokens: Path, tmp_path: Path) -> None:
    run = tiny_run(tiny_tokens, model=plain_model, recipe="w8a8", steps=4)
    train(run, tmp_path / "eager")
    result = train(replace(run, compute=replace(run.compute, compile=True)), tmp_path / "compiled")
    assert result["status"] == "finished"
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), abs=5e-3)
    errors = [line for line in log_lines(tmp_path / "compiled") if line["kind"] == "errors"]
    assert all(layer["weight"] for line in errors for layer in line["layers"].values())


def test_what_cannot_start_leaves_nothing(tiny_tokens: Path, tmp_path: Path) -> None:
    """Every refusal comes before the folder is made."""
    group = Recipe(fprop=Gemm(None, QuantSpec(INT8, PerGroup(7), AbsMean())))
    tokens = Recipe(wgrad=Gemm(QuantSpec(INT8, PerGroup(48), AbsMean()), None))  # 2 x 32 of them in a micro-batch
    refused = {
        RunError: [{"batch_size": 5}, {"split_qkv": True, "model": "llama-15m"}],
        ShapeError: [{"recipe": group}, {"recipe": tokens}],
        DataError: [{"data": str(tmp_path / "nothing")}, {"block": 10**6}],
    }
    for kind, cases in refused.items():
        for changes in cases:
            with pytest.raises(kind):
                train(replace(tiny_run(tiny_tokens), **changes), tmp_path / "out")
            assert not (tmp_path / "out").exists()


def test_a_model_with_too_few_tokens_is_refused(tiny_tokens: Path, tmp_path: Path) -> None:
    def small(vocab_size: int, block: int) -> nn.Module:
        return models.build("gpt2-nano", vocab_size - 20, block, seed=0)

    with pytest.raises(DataError, match="its tokenizer has 300 tokens, the model an embedding of 280"):
        train(tiny_run(tiny_tokens, model=small), tmp_path)
    assert TokenData.open(tiny_tokens).vocab_size == 300


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps is at least 1, got 0"),
        ({"block": 1}, "block is at least 2, got 1"),
        ({"dropout": 1.0}, "dropout is a probability below 1"),
        ({"watching": Watching(log_every=0)}, "log-every is at least 1"),
        ({"optimizer": replace(Run().optimizer, lr=math.nan)}, "lr is at least 0, got nan"),
    ],
)
def test_numbers_out_of_range(changes: dict[str, object], words: str) -> None:
    with pytest.raises(RunError, match=words):
        Run(**changes)  # type: ignore[arg-type]


def test_determinism_is_switched_on_for_the_run_alone() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    with determinism(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyError), determinism(True):
        assert torch.are_deterministic_algorithms_enabled()
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_log_names_layers_that_few_bits_make_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(batch_size=8, accumulation=2, block=32)
    training: Any = SimpleNamespace(run=run, world=World(torch.device("cpu"), 0, 2), model=nn.Linear(2, 2))
    asked = []

    def gains(model: nn.Module, tokens: int) -> dict[str, float]:
        asked.append(tokens)
        return {"h.0.attn.c_attn": 1.2, "h.0.attn.c_proj": 0.7, "h.1.attn.c_proj": 0.8}

    monkeypatch.setattr(_loop, "native_gains", gains)
    (event,) = _loop._slow_layers(training)
    assert asked == [8 // 4 * 32] and event.event == "slower"
    assert "2 layers are slower" in event.message and "0.70 to 0.80" in event.message
    assert event.message.endswith("--keep.names *.c_proj")
    monkeypatch.setattr(_loop, "native_gains", lambda *_: {"a": 1.0})
    assert _loop._slow_layers(training) == []
