# SPDX-License-Identifier: Apache-2.0
"""`lm-gpu`: GPT-2 small and Llama-134M on real text, in bfloat16, under GaussWS and DiffQ; then stored in few bits.

Through `lowbits compare`, hence resumable: the same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from experiments.checks import Check, write
from experiments.gaussian_weight_sampling.casting import FORMATS, cast_losses, ladder_losses
from lowbits import methods, models
from lowbits.analysis import causal_loss
from lowbits.data import TokenData
from lowbits.methods.gaussws import noisy
from lowbits.nn import Recipe, convert_
from lowbits.study import compare
from lowbits.train import Compute, Device, Optimizer, Run, Saving, Watching, checkpoints

MODELS = ("gpt2-small", "llama-134m")
ARMS = {
    "bf16": "none",
    "GaussWS": "gaussws",
    "GaussWS, fast bits": "gaussws,bit_lr=0.02,pull=1.0",
    "GaussWS 4": "gaussws,b_init=4.0",
    "DiffQ matched": "diffq,form=matched,noise=uniform,b_init=6.0,b_min=4.0,bit_lr=none",
    "DiffQ library": "diffq",
}
BATCH, BLOCK, VAL_BATCHES = 16, 1024, 8
Costs = dict[str, list[dict[str, float]]]


def run_of(model: str, data: str, steps: int) -> Run:
    """What all arms have in common."""
    return Run(
        model=model, data=data, steps=steps, batch_size=BATCH, block=BLOCK, optimizer=Optimizer(lr=6e-4),
        saving=Saving(save_every=steps, keep=1), compute=Compute(device=Device.AUTO),
        watching=Watching(eval_every=steps, eval_batches=VAL_BATCHES, errors_every=0, log_every=20),
    )  # fmt: skip


def trained(run: Run, words: str, seed: int, folder: Path, vocabulary: int) -> nn.Module:
    """Return the model of a finished run, on the device of this process."""
    from safetensors.torch import load_file

    assert isinstance(run.model, str)
    model = models.build(run.model, vocabulary, run.block, seed)
    convert_(model, Recipe(), seed=seed, verbose=False)
    methods.named(words).prepare_(model, seed)
    (last,) = checkpoints(folder / "checkpoints")[-1:]
    model.load_state_dict(load_file(last / "model.safetensors"), strict=False)
    model.tie_weights()
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@torch.no_grad()
def evaluate(data: TokenData, model: nn.Module, run: Run) -> float:
    """Return the validation loss in bfloat16."""
    device = next(model.parameters()).device
    losses = []
    for ids in data.val_batches(8, run.block, VAL_BATCHES * run.batch_size):
        with torch.autocast(device.type, torch.bfloat16):
            losses.append(causal_loss(model, ids.to(device)).item())
    return statistics.fmean(losses)


def costs_of(run: Run, words: str, seed: int, folder: Path) -> dict[str, float]:
    """Loss of a finished run, and after every cast; kept beside the run."""
    path = folder / "casts.json"
    if not path.exists():
        data = TokenData.open(run.data)
        model = trained(run, words, seed, folder, data.vocab_size)
        found = cast_losses(model, lambda other: evaluate(data, other, run))
        if noisy(model):
            bits = torch.cat([weight.bits().flatten() for weight in noisy(model)])
            found |= {"bits": bits.mean().item(), "lowest": bits.amin().item(), "highest": bits.amax().item()}
            found |= ladder_losses(model, lambda other: evaluate(data, other, run))
        path.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def increase(costs: Costs, arm: str, fmt: str) -> list[float]:
    return [found[fmt] - found["loss"] for found in costs[arm]]


def in_words(costs: Costs, arm: str, fmt: str) -> str:
    return f"{arm} {' '.join(f'{cost:+.4f}' for cost in increase(costs, arm, fmt))}"


def checks(costs: Costs) -> list[Check]:
    """D7 at this scale: losses, and what the casts cost."""
    losses = {arm: [found["loss"] for found in by_seed] for arm, by_seed in costs.items()}
    base = statistics.fmean(losses["bf16"])
    told = []
    for arm in ("GaussWS", "GaussWS 4"):
        mean = statistics.fmean(losses[arm])
        shown = (
            f"{arm} {' '.join(f'{x:.4f}' for x in losses[arm])}; bf16 {' '.join(f'{x:.4f}' for x in losses['bf16'])}"
        )
        told.append(Check("D7", f"{arm}: final loss at most 1 % above bf16's", shown, mean <= 1.01 * base))
    gap = statistics.fmean(losses["GaussWS"]) - statistics.fmean(losses["DiffQ matched"])
    told.append(Check("b", "GaussWS at or below matched DiffQ", f"{gap:+.4f}", gap <= 0))
    for fmt in FORMATS:
        ours, theirs = increase(costs, "GaussWS 4", fmt), increase(costs, "bf16", fmt)
        less = all(a < b for a, b in zip(ours, theirs, strict=True))
        words = f"{in_words(costs, 'GaussWS 4', fmt)}; {in_words(costs, 'bf16', fmt)}"
        told.append(Check("d", f"{fmt} costs GaussWS 4 less than bf16, in every seed", words, less))
    ratio = statistics.fmean(increase(costs, "GaussWS 4", "FP6 e3m2")) / statistics.fmean(
        increase(costs, "bf16", "FP6 e3m2")
    )
    return [*told, Check("D7", "FP6 costs GaussWS 4 at most 0.7 of what it costs bf16", f"{ratio:.2f}", ratio <= 0.7)]


def report(name: str, run: Run, out: Path, costs: Costs) -> Path:
    """Write the results file, which tells where the runs were made."""
    told = json.loads((out / "bf16" / "seed-0" / "env.json").read_text(encoding="utf-8"))
    found = checks(costs) if all(math.isfinite(row["loss"]) for rows in costs.values() for row in rows) else []
    return write(f"gaussws_lm_{name}", told, {"run": run.resolved(), "arms": ARMS, "costs": costs}, found)


def main(data: str, out: Path, names: Sequence[str] | None, steps: int, seeds: int, jobs: int) -> None:
    """Train what is not there yet, cast, and report."""
    words = {arm: "bf16" if method == "none" else f"bf16+{method}" for arm, method in ARMS.items()}
    for name in names or MODELS:
        run, folder = run_of(name, data, steps), out / name
        summary = compare(list(words.values()), range(seeds), run, folder, jobs=jobs)
        found = {arm.name: arm.runs for arm in summary.arms}
        costs = {
            arm: [costs_of(run, method, made.seed, folder / made.directory) for made in found[words[arm]]]
            for arm, method in ARMS.items()
        }
        report(name, run, folder, costs)
