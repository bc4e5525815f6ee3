# SPDX-License-Identifier: Apache-2.0
"""Telemetry says what the step multiplied, leaves the step alone, and works wherever a step does."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from lowbits.nn import Recipe, convert_, quantized_layers, set_step_
from lowbits.quantizers import QTensor
from lowbits.recipes import named
from lowbits.train import Watching, train
from lowbits.train._monitor import Sample, errors_by_operand, first_nonfinite, layer_errors
from tests.train import tiny
from tests.train.tiny import STOCHASTIC, log_lines, state_bytes, tiny_run

LAYER = "transformer.h.1.mlp.c_fc"
IDS = torch.arange(64).view(2, 32) * 7 % 300


def plain_model(vocab_size: int, block: int) -> nn.Module:
    return tiny.model(vocab_size, block, dropout=0.0)


def watch(recipe: Recipe, poison: float | None = None) -> tuple[nn.Module, Sample]:
    """One forward and backward pass of a small model."""
    torch.manual_seed(0)
    model = plain_model(300, 32)
    assert isinstance(model, GPT2LMHeadModel)
    convert_(model, recipe, verbose=False)
    if poison is not None:
        with torch.no_grad():
            quantized_layers(model)[LAYER].weight[3, 5] = poison
    sample = Sample(model)
    with sample.watching():
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return model, sample


def errors_of(out: Path) -> list[dict[str, Any]]:
    return [line for line in log_lines(out) if line["kind"] == "errors"]


def sqnr(x: Tensor, x_hat: Tensor) -> float:
    signal, noise = x.double(), (x.double() - x_hat.double())
    return 10 * math.log10((signal**2).sum().item() / (noise**2).sum().item())


def test_the_numbers_are_those_of_what_was_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64 sums over the very operands, spied on where the layer makes them."""
    seen: dict[str, list[tuple[Tensor, QTensor]]] = {}
    from lowbits.nn import _gemms

    original = _gemms._observed

    def spy(plan: Any, role: str, x: Tensor, q: QTensor) -> QTensor:
        if plan.layer_name == LAYER:
            seen.setdefault(role, []).append((x.detach().clone(), q))
        return original(plan, role, x, q)

    monkeypatch.setattr(_gemms, "_observed", spy)
    model, sample = watch(named("nvfp4"))
    found = layer_errors(model, errors_by_operand([sample.transfer()]))[LAYER]
    assert set(seen) == {f"{gemm}.{side}" for gemm in ("fprop", "dgrad", "wgrad") for side in ("lhs", "rhs")}
    assert list(found) == ["input", "weight", "grad", "fprop.lhs", "wgrad.rhs", "dgrad.lhs", "wgrad.lhs"]
    for name in list(found)[3:]:
        ((x, q),) = seen[name]
        told = found[name]
        # wgrad's operands are compared in the rotated basis, after its rounding to bf16 (2^-9 relative, 54 dB): what
        # that adds to an error of 20 dB is 10^(-3.4).
        assert told["sqnr_db"] == pytest.approx(sqnr(x, q.dequantize()), abs=0.01)
        assert told["zero"] is not None and told["clipped"] is not None and told["nonfinite"] == 0
    (x, q), told = seen["fprop.rhs"][0], found["weight"]
    x_hat = q.dequantize()
    assert told["amax"] == pytest.approx(x.abs().max().item(), rel=1e-5)
    assert told["zero"] == pytest.approx(((x != 0) & (x_hat == 0)).sum().item() / (x != 0).sum().item(), rel=1e-5)
    assert told["bias"] == pytest.approx(((x_hat * x).sum() / (x * x).sum()).item() - 1, abs=1e-5)
    assert found["grad"] == min((found["dgrad.lhs"], found["wgrad.lhs"]), key=lambda errors: errors["sqnr_db"] or 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": STOCHASTIC},
        {"recipe": "nvfp4"},
        {"recipe": "w8a8_faithful", "accumulation": 1},
        {"recipe": "w8a8_saved8"},
        {"recipe": "int8_rowwise", "split_qkv": True},
    ],
    ids=["stochastic", "nvfp4", "faithful", "saved", "split"],
)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_sampling_every_step_changes_no_bit(
    tiny_tokens: Path, tmp_path: Path, changes: dict[str, Any], checkpointing: bool
) -> None:
    run = tiny_run(tiny_tokens, steps=3, **changes)
    run = replace(run, compute=replace(run.compute, gradient_checkpointing=checkpointing))
    for every, out in ((1, "watched"), (0, "left")):
        train(
            replace(run, watching=Watching(log_every=1, eval_every=3, eval_batches=1, errors_every=every)),
            tmp_path / out,
        )
    steps = [[line for line in log_lines(tmp_path / out) if line["kind"] == "step"] for out in ("watched", "left")]
    assert steps[0] == steps[1] and len(steps[0]) == 3
    assert state_bytes(tmp_path / "watched") == state_bytes(tmp_path / "left")
    assert [line["step"] for line in errors_of(tmp_path / "watched")] == [1, 2, 3]
    assert errors_of(tmp_path / "left") == []


def test_recomputed_activations_are_measured_once(tiny_tokens: Path, tmp_path: Path) -> None:
    run = tiny_run(
        tiny_tokens, recipe="nvfp4", steps=2, watching=Watching(errors_every=1, eval_every=2, eval_batches=1)
    )
    train(run, tmp_path / "kept")
    train(replace(run, compute=replace(run.compute, gradient_checkpointing=True)), tmp_path / "recomputed")
    assert errors_of(tmp_path / "kept") == errors_of(tmp_path / "recomputed") != []


def test_a_resumed_run_measures_what_an_unbroken_one_does(tiny_tokens: Path, tmp_path: Path) -> None:
    run = tiny_run(tiny_tokens, recipe="nvfp4", steps=8)
    run = replace(run, watching=replace(run.watching, errors_every=3), saving=replace(run.saving, save_every=2, keep=9))
    train(run, tmp_path / "whole")
    (tmp_path / "whole/result.json").rename(tmp_path / "result.json")
    for late in ("step-00000006", "step-00000008"):
        (tmp_path / "whole/checkpoints" / late).rename(tmp_path / late)
    whole = errors_of(tmp_path / "whole")
    train(run, tmp_path / "whole", resume=True)
    assert errors_of(tmp_path / "whole") == whole and [line["step"] for line in whole] == [3, 6]


def test_two_processes_measure_what_one_does(tiny_tokens: Path, tmp_path: Path) -> None:
    """Rows and tiles have scales of their own, so that half a batch quantizes as it does within the whole."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from pathlib import Path\nfrom lowbits.train import Watching\n"
        "from tests.train.test_telemetry import plain_model\nfrom tests.train.tiny import tiny_run\n"
        f"def run():\n    data = Path({str(tiny_tokens)!r})\n"
        "    return tiny_run(data, model=plain_model, recipe='w8a8', steps=1, accumulation=1,\n"
        "                    watching=Watching(errors_every=1, eval_every=1, eval_batches=2))\n"
    )
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "lowbits.cli", "train", str(file), "--out", str(tmp_path / "two")],
        capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    watching = Watching(errors_every=1, eval_every=1, eval_batches=2)
    train(
        tiny_run(tiny_tokens, model=plain_model, recipe="w8a8", steps=1, accumulation=1, watching=watching),
        tmp_path / "one",
    )
    ((one,), (two,)) = errors_of(tmp_path / "one"), errors_of(tmp_path / "two")
    for layer, roles in one["layers"].items():
        for role in ("input", "weight"):
            # A sum of half the rows rounds differently in attention: float32, so 1e-4 of a decibel is far above it.
            assert two["layers"][layer][role] == pytest.approx(roles[role], rel=1e-3, abs=1e-4)


def test_layers_in_high_precision_have_no_numbers(tiny_tokens: Path, tmp_path: Path) -> None:
    def one(name: str, module: nn.Module) -> Recipe | None:
        return named("nvfp4") if name == LAYER else Recipe() if ".mlp." in name else None

    watching = Watching(errors_every=1, eval_every=1, eval_batches=1)
    train(tiny_run(tiny_tokens, layers=one, steps=1, watching=watching), tmp_path / "one")
    (line,) = errors_of(tmp_path / "one")
    assert {layer for layer, roles in line["layers"].items() if roles["input"]} == {LAYER}
    train(tiny_run(tiny_tokens, recipe="m8_channel", steps=1, watching=watching), tmp_path / "none")
    assert errors_of(tmp_path / "none") == []


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_nonfinite_operand_is_named(poison: float) -> None:
    model, sample = watch(named("w8a8g8"), poison)
    found = errors_by_operand([sample.transfer()])
    event = first_nonfinite(found)
    assert event is not None and (event.event, event.layer, event.role) == ("nonfinite", LAYER, "weight")
    assert "fprop.rhs" in event.message and "more operands after it" in event.message
    numbers = layer_errors(model, found)[LAYER]["weight"]
    assert numbers["sqnr_db"] is None and numbers["nonfinite"] == pytest.approx(1 / (32 * 128), rel=1e-5)
    assert first_nonfinite(errors_by_operand([watch(named("w8a8g8"))[1].transfer()])) is None


def test_a_skipped_step_says_where_the_numbers_were_lost(tiny_tokens: Path, tmp_path: Path) -> None:
    def poisoned(vocab_size: int, block: int) -> nn.Module:
        model = plain_model(vocab_size, block)
        with torch.no_grad():
            dict(model.named_parameters())[f"{LAYER}.weight"][0, 0] = math.nan
        return model

    watching = Watching(errors_every=1, eval_every=9, log_every=9, max_nonfinite=3)
    result = train(tiny_run(tiny_tokens, model=poisoned, recipe="w8a8", steps=5, watching=watching), tmp_path / "out")
    assert result["status"] == "diverged" and result["diverged_layer"] == LAYER
    events = [line for line in log_lines(tmp_path / "out") if line["kind"] == "event"]
    told = [(event["event"], event["layer"], event["role"]) for event in events]
    assert told[:2] == [("skipped", LAYER, "weight"), ("nonfinite", LAYER, "weight")]
    assert told[-1] == ("diverged", LAYER, "weight") and ("skipped", "", "") in told  # found once in a row of them


def test_a_pass_apart_leaves_nothing_behind() -> None:
    """What compiled runs do: gradients are gone and buffers are as they were."""
    torch.manual_seed(0)
    model = plain_model(300, 32)
    assert isinstance(model, GPT2LMHeadModel)
    convert_(model, STOCHASTIC, verbose=False)
    set_step_(model, 5)
    model.register_buffer("seen", torch.zeros(1))

    def loss() -> Tensor:
        set_step_(model, 9)
        model.seen += 1
        return model(input_ids=IDS, labels=IDS).loss

    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    sample = Sample(model)
    sample.measure_apart(loss)
    assert len(sample.transfer()) == 8 * 4  # X, W, and G twice
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    assert all(layer.observer is None for layer in quantized_layers(model).values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler imports deprecated parts of torch and reads .grad of non-leaves
def test_sampling_changes_no_bit_of_a_compiled_run(tiny_tokens: Path, tmp_path: Path) -> None:
    run = tiny_run(tiny_tokens, model=plain_model, recipe="nvfp4", steps=4)
    run = replace(run, compute=replace(run.compute, compile=True))
    for every, out in ((2, "watched"), (0, "left")):
        train(
            replace(run, watching=Watching(log_every=1, eval_every=4, eval_batches=1, errors_every=every)),
            tmp_path / out,
        )
    assert state_bytes(tmp_path / "watched") == state_bytes(tmp_path / "left")
    assert [line["step"] for line in errors_of(tmp_path / "watched")] == [2, 4]
    assert json.loads((tmp_path / "watched/result.json").read_text())["status"] == "finished"
