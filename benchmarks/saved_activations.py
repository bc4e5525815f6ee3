# SPDX-License-Identifier: Apache-2.0
"""What activations saved in 8 bits cost in loss, and how far they turn the gradient.

    python benchmarks/saved_activations.py --data runs/data/stdlib-tokens

A small GPT-2 under each recipe and seed, the same batches and initial weights for all recipes of a seed; the loss is
that of the validation split after the last step, quantizers on. The gradient of a batch is then taken at the weights
that the first recipe reached, under every recipe, and compared with the first one's: 1 - cosine, and the norm of the
difference over the norm.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import FAILURES, Report, Row, first_line, number, parser
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowbits.analysis import causal_loss, measure_memory
from lowbits.data import TokenData
from lowbits.nn import convert_
from lowbits.recipes import named
from lowbits.train import Run, Watching, train

ARMS = ("w8a8", "bf16", "w8a8_faithful", "w8a8_saved8")


def trained(arm: str, seed: int, options: Any, out: Path) -> Row:
    """Train one model; its validation loss."""
    watching = Watching(eval_every=options.steps, eval_batches=32, errors_every=0, log_every=options.steps)
    run = Run(
        model=options.model, data=options.data, recipe=arm, steps=options.steps, batch_size=8, block=128, seed=seed,
        watching=watching,
    )  # fmt: skip
    found = train(run, out / f"{arm}-{seed}")
    return {"arm": arm, "seed": seed, "steps": options.steps, "model": options.model, "loss": found["val_loss_on"]}


def loss_of(model: Any, ids: Tensor) -> Tensor:
    with torch.autocast(ids.device.type, torch.bfloat16):
        return causal_loss(model, ids)


def gradient(arm: str, folder: Path, ids: Tensor) -> tuple[Tensor, int]:
    """The gradient of all parameters, and the bytes that waited for it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").train()
    convert_(model, named(arm), verbose=False)
    loss_of(model, ids).backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()
    return found, measure_memory(model, None, loss_of, ids).measured.saved_activations


def turned(arm: str, seed: int, options: Any, out: Path) -> Row:
    """How far the gradient is from the first recipe's, at that recipe's weights."""
    folder = max((out / f"{ARMS[0]}-{seed}" / "checkpoints").iterdir())
    ids = TokenData.open(options.data).batch("train", options.steps, batch_size=8, block=128, seed=seed)
    (g, saved), (exact, before) = gradient(arm, folder, ids), gradient(ARMS[0], folder, ids)
    cosine = torch.cosine_similarity(g, exact, 0).item()
    return {
        "one_minus_cosine": 1 - cosine, "relative_error": ((g - exact).norm() / exact.norm()).item(),
        "saved_bytes": saved, "saved_over_first": saved / before,
    }  # fmt: skip


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--data", required=True, help="a folder of tokens: lowbits data prepare")
    made.add_argument("--model", default="gpt2-pico", help="a size of lowbits.models")
    made.add_argument("--steps", type=int, default=300, help="optimizer steps")
    made.add_argument("--seeds", type=int, default=3, help="runs of each recipe")
    options = made.parse_args()
    columns = {
        "loss": number("loss", ".4f"), "1 - cosine": number("one_minus_cosine", ".1e"),
        "relative error": number("relative_error", ".4f"), "saved bytes": number("saved_over_first"),
    }  # fmt: skip
    report = Report("saved_activations", torch.device(options.device), options, {}, columns)
    with tempfile.TemporaryDirectory() as folder:
        out, losses = Path(folder), dict[str, list[float]]()
        for seed in range(options.seeds):
            for arm in ARMS:
                task = functools.partial(_row, arm, seed, options, out)
                row = report.measure(f"{arm}, seed {seed}", task)
                losses.setdefault(arm, []).append((row or {}).get("loss", float("nan")))
    for arm, found in losses.items():
        print(f"{arm}: {statistics.fmean(found):.4f}", flush=True)
    return report.show("Activations saved in 8 bits")


def _row(arm: str, seed: int, options: Any, out: Path) -> Row:
    return trained(arm, seed, options, out) | turned(arm, seed, options, out)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except FAILURES as failure:
        raise SystemExit(first_line(failure)) from failure
