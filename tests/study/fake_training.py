# SPDX-License-Identifier: Apache-2.0
"""Trainers that leave what `lowbits.train.train` leaves, in milliseconds. At module level: processes import them."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lowbits.train import Run

LOSSES = {"bf16": 3.0, "w8a8": 3.01, "w4_channel": 3.2}


def trainer(run: Run, out: Path, /, *, resume: bool) -> None:
    """Finish, diverge, raise or die, as the recipe says."""
    _begin(run, out, resume)
    if run.recipe == "a4_tensor":
        raise ValueError("the activations are too coarse")
    if run.recipe == "w4_tensor":
        os.kill(os.getpid(), signal.SIGKILL)
    if run.recipe == "g4_tensor":
        where = {"diverged_at": 2, "diverged_layer": "h.0", "diverged_role": "grad", "val_loss_on": None}
        _end(run, out, "diverged", **where)
    else:
        _end(run, out, "finished", val_loss_on=LOSSES[run.recipe_name] + 0.01 * (run.seed % 1000))


def slow_trainer(run: Run, out: Path, /, *, resume: bool) -> None:
    """Wait for SIGTERM and save, the first time; finish when resumed."""
    first = not (out / "log.jsonl").exists()
    _begin(run, out, resume)
    if not first:
        _end(run, out, "finished", val_loss_on=3.0)
        return
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    (out / "ready").touch()
    deadline = time.monotonic() + 60
    while not stopped and time.monotonic() < deadline:
        time.sleep(0.02)
    _end(run, out, "interrupted")


def tiny_model(vocab_size: int, block: int) -> GPT2LMHeadModel:
    """A GPT-2 of two layers that trains in milliseconds."""
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": -(-vocab_size // 8) * 8, "n_positions": block}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=None))


def _begin(run: Run, out: Path, resume: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(run.resolved()))
    (out / "env.json").write_text(json.dumps({"device": "cpu", "threads": torch.get_num_threads()}))
    with (out / "calls").open("a") as calls:
        calls.write(f"resume={resume}\n")
    print("hello from", run.recipe_name)
    with (out / "log.jsonl").open("a") as log:
        for step in range(1, run.steps + 1):
            log.write(json.dumps({"kind": "step", "step": step, "tokens": step, "seconds": step, "loss": 4.0}) + "\n")


def _end(run: Run, out: Path, status: str, **values: object) -> None:
    told = {"status": status, "recipe": run.recipe_name, "seed": run.seed, "steps": run.steps, "seconds": 1.0}
    (out / "result.json").write_text(json.dumps(told | values))
