# SPDX-License-Identifier: Apache-2.0
"""Is the memory that shapes predict the memory that a GPU hands out?

Trains two steps of GPT-2 small, medium and large at context 1024 (bf16 autocast, no dropout, lowbits' AdamW) under
several recipes and compares the prediction with `torch.cuda.max_memory_allocated` of the second step. Left out, and
printed: what the libraries keep for themselves (cuBLAS and cuDNN workspaces), measured after the first step. The
allocator's reserve is no part of that counter. On a CPU, which has no such counter, a small model's saved bytes are
compared with the saved-tensor hooks instead.

    python benchmarks/memory_ledger.py [--sizes gpt2-small ...] [--batches 4 ...] [--length 1024] [--recipes bf16 ...]

Writes benchmarks/results/<device>/memory_ledger.json.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from lowbits import models, recipes
from lowbits.analysis import (
    Ledger,
    causal_loss,
    device_name,
    linear_input_bytes,
    measure_memory,
    predict_memory,
    provenance,
)
from lowbits.nn import convert_
from lowbits.optim import AdamW, param_groups

RESULTS = Path(__file__).parent / "results"
VOCABULARY = 50257
CUDA_GRID = {"sizes": ["gpt2-small", "gpt2-medium", "gpt2-large"], "batches": [4, 8, 16], "length": 1024}
CPU_GRID = {"sizes": ["gpt2-nano"], "batches": [1, 4], "length": 128}
RECIPES = ["bf16", "w8a8", "w8a8_faithful", "m8_channel"]


def step(model: PreTrainedModel, optimizer: AdamW, ids: Tensor) -> None:
    """Do what the training loop does for one step without accumulation."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        loss = causal_loss(model, ids)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measured_peak(model: PreTrainedModel, optimizer: AdamW, ids: Tensor, ledger: Ledger) -> dict[str, int]:
    """Return the peak of the second step, and what the libraries keep for themselves."""
    step(model, optimizer, ids)
    gc.collect()
    torch.cuda.synchronize()
    resident = ledger.memory.measured.weights + ledger.memory.measured.optimizer + ids.nbytes
    workspace = torch.cuda.memory_allocated() - resident
    torch.cuda.reset_peak_memory_stats()
    step(model, optimizer, ids)
    torch.cuda.synchronize()
    # the allocator hands out whole blocks: what was asked for stands beside it
    requested = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    return {
        "peak": torch.cuda.max_memory_allocated() - workspace,
        "requested_peak": requested - workspace,
        "workspace": workspace,
    }


def measured_saved(model: PreTrainedModel, optimizer: AdamW, ids: Tensor) -> dict[str, int]:
    """Return the bytes that the hooks see."""

    def loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16):
            return causal_loss(model, ids)

    return {"saved": measure_memory(model, optimizer, loss, ids).measured.saved_activations}


def rows(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, object]]:
    """Measure every cell of the grid."""
    for size in options.sizes:
        model = models.build(size, VOCABULARY, options.length, seed=0).to(device)  # type: ignore[arg-type]
        for recipe in options.recipes:
            convert_(model, recipes.named(recipe), verbose=False)
            optimizer = AdamW(param_groups(model, 0.1))
            for batch in options.batches:
                ids = torch.randint(0, VOCABULARY, (batch, options.length), device=device)
                ledger = predict_memory(model, batch, options.length, device=device.type)
                cuda = device.type == "cuda"
                found = measured_peak(model, optimizer, ids, ledger) if cuda else measured_saved(model, optimizer, ids)
                yield cell(size, recipe, model, ledger, found, tuple(ids.shape))
            del optimizer
            gc.collect()
        del model


def cell(
    size: str, recipe: str, model: PreTrainedModel, ledger: Ledger, found: dict[str, int], shape: tuple[int, ...]
) -> dict[str, object]:
    predicted = ledger.peak if "peak" in found else ledger.memory.measured.saved_activations
    measured = found.get("peak", found.get("saved", 0))
    in_bf16, in_codes = linear_input_bytes(model, shape[0] * shape[1])
    return {
        "size": size,
        "recipe": recipe,
        "batch": shape[0],
        "length": shape[1],
        "predicted": predicted,
        "measured": measured,
        "error": predicted / measured - 1,
        "counters": found,
        "ledger": ledger.memory.as_json() | {"temporaries": ledger.temporaries, "phases": ledger.phases},
        "saved": {kind.value: nbytes for kind, nbytes in ledger.saved.items()},
        "converted_linear_inputs": {"bf16": in_bf16, "codes_and_scales": in_codes, "ratio": in_codes / in_bf16},
    }


def print_table(cells: list[dict[str, object]], device: torch.device) -> None:
    what = "peak" if device.type == "cuda" else "saved activations"
    table = Table(title=f"{what} of a training step, MiB, {device_name(device)}")
    columns = ("size", "recipe", "batch", "weights", "grads", "optimizer", "saved", "temporaries", "few bits")
    for column in (*columns, "predicted", "measured", "error"):
        table.add_column(column, justify="right")
    for c in cells:
        ledger = c["ledger"]
        held, few = ledger["measured"], ledger["stored_in_few_bits"]  # type: ignore[index]
        parts = [*held.values(), ledger["temporaries"], sum(few.values()), c["predicted"], c["measured"]]  # type: ignore[index]
        sizes = [f"{part / 2**20:,.1f}" for part in parts]
        table.add_row(str(c["size"]), str(c["recipe"]), str(c["batch"]), *sizes, f"{c['error']:+.2%}")
    Console(width=140).print(table)


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    grid = CUDA_GRID if device.type == "cuda" else CPU_GRID
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", nargs="+", default=grid["sizes"])
    parser.add_argument("--batches", nargs="+", type=int, default=grid["batches"])
    parser.add_argument("--length", type=int, default=grid["length"])
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    options = parser.parse_args()
    cells = list(rows(options, device))
    print_table(cells, device)
    worst = max(abs(float(c["error"])) for c in cells)  # type: ignore[arg-type]
    print(f"largest error: {worst:.2%}")
    path = RESULTS / device_name(device) / "memory_ledger.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"provenance": provenance(device), "options": vars(options), "largest_error": worst, "cells": cells}
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
