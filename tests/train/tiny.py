# SPDX-License-Identifier: Apache-2.0
"""A run of a second: real text of a few kilobytes, a GPT-2 of two layers, and ways to kill its process."""

from __future__ import annotations

import argparse
import json
import os
import signal
import string
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbits.data import TokenData, prepare
from lowbits.formats import INT8, UINT8
from lowbits.nn import Gemm, Recipe
from lowbits.quantizers import PerColumn, PerRow, QuantSpec, Rounding
from lowbits.train import Autocast, Compute, Device, Optimizer, Run, Saving, Watching, train

_NOISY = QuantSpec(INT8, PerRow(), rounding=Rounding.STOCHASTIC)
# Stochastic rounding in all three GEMMs and in both moments, which are stored as int8.
STOCHASTIC = Recipe(
    fprop=Gemm(_NOISY, QuantSpec(INT8, PerRow())),
    dgrad=Gemm(_NOISY, None),
    wgrad=Gemm(QuantSpec(INT8, PerColumn(), rounding=Rounding.STOCHASTIC), None),
    first_moment=_NOISY,
    second_moment=QuantSpec(UINT8, PerRow(), rounding=Rounding.STOCHASTIC),
)


def model(vocab_size: int, block: int, dropout: float = 0.1) -> nn.Module:
    """Two layers of width 32, with dropout, so that a resume has to restore its stream too."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_positions=block,
            n_layer=2,
            n_embd=32,
            n_head=2,
            embd_pdrop=dropout,
            resid_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="sdpa",
        )
    )


def tokens(folder: Path) -> TokenData:
    """Prepare some modules of the standard library with a vocabulary of 300."""
    for module in (argparse, json.decoder, json.encoder, string, textwrap):
        text = folder / "text" / f"{module.__name__}.txt"
        text.parent.mkdir(parents=True, exist_ok=True)
        assert module.__file__ is not None
        text.write_text(Path(module.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return prepare(folder / "text", folder / "tokens", vocab_size=300, val_fraction=0.2)


def tiny_run(data: Path, **changes: Any) -> Run:
    """Twelve steps of two micro-batches, looked at often."""
    base = Run(
        model=model,
        data=str(data),
        recipe="w8a8",
        steps=12,
        batch_size=4,
        block=32,
        accumulation=2,
        optimizer=Optimizer(lr=1e-2),
        compute=Compute(device=Device.CPU, autocast=Autocast.NONE),
        saving=Saving(save_every=4, keep=2),
        watching=Watching(log_every=1, eval_every=4, eval_batches=2, errors_every=6, max_nonfinite=3),
    )
    return replace(base, **changes)


def log_lines(out: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock and without the notes of a resume."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    clock = ("seconds", "tokens_per_second", "memory_bytes")
    kept = [line for line in lines if line.get("event") not in ("resumed", "fallback", "interrupted")]
    return [{key: value for key, value in line.items() if key not in clock} for line in kept]


def state_bytes(out: Path) -> dict[str, bytes]:
    """Weights and moments of the last checkpoint."""
    last = sorted((out / "checkpoints").glob("step-*"))[-1]
    return {name: (last / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}


def train_until(moment: int, data: str, out: str) -> None:
    """Train in a process that SIGKILLs itself at its `moment`-th danger: an fsync, a rename, a line of the log.

    Told moment 0, it counts them instead and leaves their number in `<out>.moments`.
    """
    torch.set_num_threads(1)
    seen = 0

    def dangerous(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted

    from lowbits.train import _log

    os.fsync = dangerous(os.fsync)
    Path.rename = dangerous(Path.rename)  # type: ignore[method-assign]
    _log.Log.write = dangerous(_log.Log.write)  # type: ignore[method-assign]
    train(tiny_run(Path(data), recipe=STOCHASTIC), out, resume=True)
    if moment == 0:
        Path(f"{out}.moments").write_text(str(seen))


def run_command(words: list[str]) -> None:
    """Be the `lowbits` command in a process of its own."""
    from lowbits.cli import main

    raise SystemExit(main(words))
