# SPDX-License-Identifier: Apache-2.0
"""`memory`: the largest GPT and Llama that train in a given memory, by the ledger.

A family is a row of shapes between published ones: the depth is interpolated linearly in the width. One sequence of
1024 tokens, no dropout, no clipping. `memory --check` trains two sizes on a GPU and compares the peaks.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from experiments.eightbit_optimizers.picture import draw
from experiments.eightbit_optimizers.runs import Check, write
from lowbits.analysis import Ledger, Updating, causal_loss, predict_memory
from lowbits.optim import AdamW, AdamW8bit, CodecOptimizer, step_in_backward
from lowbits.quantizers import Rounding

GIB, LENGTH, WIDTHS = 2**30, 1024, range(512, 12289, 128)
BUDGETS = (8, 16, 24, 80, 139)  # the last is what an H200 has
RESERVED = GIB
"""Of every budget: CUDA's context, the libraries' workspaces, and what the allocator cannot hand out."""

PICTURE = Path(__file__).parents[2] / "docs" / "papers" / "images" / "largest-model.svg"


@dataclass(frozen=True)
class Family:
    """Shapes of one architecture.

    Args:
        published: width and depth, ascending in width.
        config: keyword arguments of the transformers config for a width and a depth.
    """

    published: tuple[tuple[int, int], ...]
    config: Callable[[int, int], dict[str, Any]]

    def depth(self, width: int) -> int:
        """Return the interpolated number of blocks; beyond the last shape as many as it has."""
        for (low, a), (high, b) in zip(self.published, self.published[1:], strict=False):
            if width <= high:
                return round(a + (b - a) * max(0, width - low) / (high - low))
        return self.published[-1][1]


def _gpt(width: int, depth: int) -> dict[str, Any]:
    dropouts = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    return {"model_type": "gpt2", "vocab_size": 50264, "n_positions": LENGTH, "n_embd": width, "n_layer": depth,
            "n_head": width // 64, **dropouts}  # fmt: skip


def _llama(width: int, depth: int) -> dict[str, Any]:
    return {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": LENGTH, "hidden_size": width,
            "num_hidden_layers": depth, "num_attention_heads": width // 128 or 1,
            "intermediate_size": -(-width * 8 // 3 // 256) * 256, "tie_word_embeddings": False}  # fmt: skip


FAMILIES = {
    # Radford et al. 2019, table 2; Brown et al. 2020, table 2.1; Zhang et al. 2022 (OPT), table 1
    "GPT": Family(((768, 12), (1024, 24), (1280, 36), (1600, 48), (2560, 32), (4096, 32), (5120, 40), (7168, 48),
                   (9216, 64), (12288, 96)), _gpt),
    # torchtitan's 1B; OpenLLaMA 3B; Touvron et al. 2023, table 2
    "Llama": Family(((768, 12), (2048, 18), (3200, 26), (4096, 32), (5120, 40), (6656, 60), (8192, 80)), _llama),
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """One way to train.

    Args:
        optimizer: of parameters.
        weights: float32 ones are computed with under bf16 autocast, bfloat16 ones directly.
        in_backward: with `step_in_backward`.
    """

    optimizer: Callable[[Any], CodecOptimizer]
    weights: torch.dtype = torch.float32
    in_backward: bool = False

    @property
    def autocast(self) -> bool:
        return self.weights == torch.float32


_ROUNDED = partial(AdamW8bit, rounding=Rounding.STOCHASTIC)
SETUPS = {
    "32-bit": Setup(AdamW),
    "8-bit": Setup(AdamW8bit),
    "8-bit in backward": Setup(AdamW8bit, in_backward=True),
    "8-bit, bf16 weights": Setup(_ROUNDED, torch.bfloat16),
    "8-bit, bf16 weights, in backward": Setup(_ROUNDED, torch.bfloat16, in_backward=True),
}
SIZES = {"Llama 1B": ("Llama", 2048), "Llama 3B": ("Llama", 3200)}


def build(family: str, width: int, device: str, weights: torch.dtype) -> PreTrainedModel:
    """Return a model of a family on a device; on `meta` it takes no memory."""
    shapes = FAMILIES[family]
    config = AutoConfig.for_model(**shapes.config(width, shapes.depth(width)))
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=weights).train()


def predict(model: PreTrainedModel, setup: Setup, checkpointed: bool) -> Ledger:
    """Return the ledger of a setup."""
    switch_checkpointing(model, checkpointed)
    updating = Updating(setup.optimizer(model.parameters()), setup.in_backward)
    return predict_memory(model, 1, LENGTH, autocast=setup.autocast, device="cuda", updating=updating)


def switch_checkpointing(model: PreTrainedModel, on: bool) -> None:
    if on:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    else:
        disable = getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)
        disable()


@cache
def cell(family: str, width: int, setup: str, checkpointed: bool) -> dict[str, Any]:
    """Return shape, parameters and predicted peak of one model."""
    model = build(family, width, "meta", SETUPS[setup].weights)
    ledger = predict(model, SETUPS[setup], checkpointed)
    return {
        "width": width, "layers": FAMILIES[family].depth(width),
        "parameters": sum(p.numel() for p in model.parameters()), "peak": ledger.peak,
        "phase": max(ledger.phases, key=ledger.phases.__getitem__),
    }  # fmt: skip


def largest(fits: Callable[[int], bool], widths: Sequence[int] = WIDTHS) -> int | None:
    """Return the largest width that fits, given that every smaller one does too; None where none does."""
    low, high = 0, len(widths)  # widths[:low] fit, widths[high:] do not
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(widths[middle]) else (low, middle)
    return widths[low - 1] if low else None


def table() -> list[dict[str, Any]]:
    """Return the largest model for every family, budget, setup, with and without checkpointing."""
    rows = []
    for family in FAMILIES:
        for checkpointed in (False, True):
            for budget in BUDGETS:
                for setup in SETUPS:
                    room = budget * GIB - RESERVED
                    width = largest(lambda w: cell(family, w, setup, checkpointed)["peak"] <= room)  # noqa: B023
                    found = cell(family, width, setup, checkpointed) if width else {}
                    rows.append({"family": family, "checkpointed": checkpointed, "gib": budget, "setup": setup} | found)
    return rows


# --- the check ------------------------------------------------------------------------------------------------------
def measured_peak(model: PreTrainedModel, setup: Setup, ledger: Ledger) -> dict[str, int]:
    """Return the peak of the second step, without what the libraries keep for themselves."""
    optimizer = setup.optimizer(model.parameters())
    if setup.in_backward:
        step_in_backward(model, optimizer)
    ids = torch.randint(0, model.config.vocab_size, (1, LENGTH), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=setup.autocast):
            loss = causal_loss(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    gc.collect()
    torch.cuda.synchronize()
    states = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    resident = ledger.memory.measured.weights + states + ids.nbytes
    workspace = torch.cuda.memory_allocated() - resident
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - workspace
    return {"measured": peak, "states": states, "workspace": workspace, "reserved": torch.cuda.max_memory_reserved()}


def compared() -> Iterator[dict[str, Any]]:
    """Train every size under every setup and yield measured and predicted peaks."""
    for size, (family, width) in SIZES.items():
        for name, setup in SETUPS.items():
            for checkpointed in (False, True):
                model = build(family, width, "cuda", setup.weights)
                ledger = predict(model, setup, checkpointed)
                found = measured_peak(model, setup, ledger)
                yield {
                    "size": size, "setup": name, "checkpointed": checkpointed, "predicted": ledger.peak, **found,
                    "parameters": sum(p.numel() for p in model.parameters()), "phases": ledger.phases,
                    "states_predicted": ledger.memory.measured.optimizer,
                    "error": ledger.peak / found["measured"] - 1,
                }  # fmt: skip
                del model
                gc.collect()
                torch.cuda.empty_cache()


def check() -> Path:
    """Compare the ledger with a GPU at two sizes and write the results file."""
    if not torch.cuda.is_available():
        raise SystemExit("memory --check: torch sees no CUDA device here.")
    cells = []
    for found in compared():
        cells.append(found)
        print({k: v for k, v in found.items() if k != "phases"}, flush=True)
    worst = max(abs(found["error"]) for found in cells)
    statement = "predicted peaks within 5 % of the allocator's"
    checks = [Check("memory", statement, f"largest error {worst:.1%} of {len(cells)} cells", worst <= 0.05)]
    return write("memory_check", {"length": LENGTH, "cells": cells}, checks, torch.device("cuda"))


def main() -> Path:
    """Compute the table, draw the picture, and write the results file."""
    rows = table()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(draw([row for row in rows if row["checkpointed"]], list(SETUPS)), encoding="utf-8")
    content = {"length": LENGTH, "reserved": RESERVED, "rows": rows}
    return write("memory", content, [], torch.device("cpu"))
