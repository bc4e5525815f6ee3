# SPDX-License-Identifier: Apache-2.0
"""Do runs on integer and FP8 units learn what simulated ones learn? For `train_step.py --curves --data FOLDER`.

A Llama is trained from scratch, eagerly, with float32 parameters under bfloat16 autocast: bf16, and each recipe
natively and simulated. Two runs of a seed read the same batches from the same weights; another seed has other weights
and the same batches. So a distance between native and simulated beside one between seeds says how much execution
matters, and `bf16, again` how much the order of sums on a GPU does.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import replace
from typing import Any

import torch
from measuring import Report, Row, number
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lowbits.analysis import causal_loss
from lowbits.data import TokenData
from lowbits.kernels import Execution
from lowbits.nn import Recipe, convert_, set_step_
from lowbits.recipes import named

TAIL = 10  # steps whose mean loss is compared


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what this table takes."""
    group = parser.add_argument_group("--curves")
    group.add_argument("--curves", action="store_true", help="losses of native and simulated runs instead")
    group.add_argument("--data", metavar="FOLDER", help="tokens, as `lowbits data prepare` writes them")
    group.add_argument("--curve-recipes", nargs="+", default=["fp8_rowwise", "int8_rowwise"], metavar="RECIPE")
    group.add_argument("--steps", type=int, default=60)
    group.add_argument("--seeds", type=int, default=2)
    group.add_argument("--curve-model", type=int, nargs=4, default=[1024, 2816, 16, 8], help="of the Llama",
                       metavar=("WIDTH", "FFN", "HEADS", "LAYERS"))  # fmt: skip
    group.add_argument("--curve-batch", type=int, nargs=2, default=[8, 512], metavar=("SEQUENCES", "LENGTH"))


def build(options: argparse.Namespace, vocabulary: int, seed: int, device: torch.device) -> nn.Module:
    width, ffn, heads, layers = options.curve_model
    config = AutoConfig.for_model(
        "llama", hidden_size=width, intermediate_size=ffn, num_attention_heads=heads, num_key_value_heads=heads,
        num_hidden_layers=layers, vocab_size=-(-vocabulary // 16) * 16, max_position_embeddings=options.curve_batch[1],
        tie_word_embeddings=False, use_cache=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()


def train(recipe: Recipe | None, seed: int, data: TokenData, options: argparse.Namespace, device: torch.device) -> Row:
    """Return the losses of a run."""
    model = build(options, data.vocab_size, seed, device)
    if recipe is not None:
        convert_(model, recipe, seed=seed, verbose=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    sequences, length = options.curve_batch
    losses = []
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 10)
        ids = data.batch("train", step, batch_size=sequences, block=length, seed=0).to(device)
        set_step_(model, step)
        with torch.autocast(device.type, torch.bfloat16):
            loss = causal_loss(model, ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    found = torch.stack(losses).tolist()
    return {"losses": found, "last": sum(found[-TAIL:]) / len(found[-TAIL:])}


def distance(a: Row, b: Row) -> dict[str, float]:
    """How far two curves are apart: at most, on average, and at their ends."""
    gaps = [abs(x - y) for x, y in zip(a["losses"], b["losses"], strict=True)]
    return {"largest": max(gaps), "mean": sum(gaps) / len(gaps), "last": abs(a["last"] - b["last"])}


def table(options: argparse.Namespace, device: torch.device) -> int:
    """Train all runs and compare them."""
    if not options.data:
        raise SystemExit("--curves trains on text: name a folder that `lowbits data prepare` wrote with --data")
    data = TokenData.open(options.data)
    columns = {"loss of the last steps": number("last", ".4f"), "largest distance": number("largest", ".4f"),
               "mean distance": number("mean", ".4f"), "distance of the last steps": number("tail", ".4f")}  # fmt: skip
    ceilings: Row = {"data": data.fingerprint}
    report = Report("native_curves", device, options, ceilings, columns)
    arms: dict[str, Recipe | None] = {"bf16": None, "bf16, again": None}
    for name in options.curve_recipes:
        ways = {"native": Execution.NATIVE, "simulated": Execution.SIMULATED}
        arms |= {f"{name} {how}": replace(named(name), execution=way) for how, way in ways.items()}
    runs: dict[tuple[str, int], Row] = {}
    for seed in range(options.seeds):
        for arm, recipe in arms.items():
            task = functools.partial(train, recipe, seed, data, options, device)
            if (row := report.measure(f"{arm}, seed {seed}", task)) is not None:
                runs[arm, seed] = row
    for key, (one, other) in pairs(options).items():
        if one in runs and other in runs:
            report.measure(key, functools.partial(compared, runs[one], runs[other]))
    return report.show(f"{options.steps} steps of native and simulated runs")


def compared(one: Row, other: Row) -> Row:
    found = distance(one, other)
    return {"largest": found["largest"], "mean": found["mean"], "tail": found["last"]}


def pairs(options: argparse.Namespace) -> dict[str, tuple[Any, Any]]:
    """Runs that are compared."""
    found: dict[str, tuple[Any, Any]] = {}
    for seed in range(options.seeds):
        found[f"bf16 and again, seed {seed}"] = ("bf16", seed), ("bf16, again", seed)
        for name in options.curve_recipes:
            key = f"{name}, native and simulated, seed {seed}"
            found[key] = (f"{name} native", seed), (f"{name} simulated", seed)
    for arm in ("bf16", *(f"{name} native" for name in options.curve_recipes)):
        for seed in range(1, options.seeds):
            found[f"{arm}, seeds 0 and {seed}"] = (arm, 0), (arm, seed)
    return found
