# SPDX-License-Identifier: Apache-2.0
"""`lm-gpu`: GPT-2 small on real text under AdamW with 32-bit, 8-bit and linear 8-bit moments, three seeds each.

Through `lowbits compare`, hence resumable. The recipes quantize the moments of the linear layers' weights (85M of 124M
parameters); embeddings, norms and biases keep 32 bits.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

from experiments.checks import Check, write
from experiments.eightbit_optimizers.runs import SEEDS
from lowbits.study import Summary, compare, summarize
from lowbits.train import Compute, Device, Optimizer, Run, Saving, Watching

ARMS = ["bf16", "adam8bit", "adam8bit_linear"]
RUN = Run(
    model="gpt2-small", steps=500, batch_size=8, block=1024,
    optimizer=Optimizer(lr=6e-4, betas=(0.9, 0.999)), saving=Saving(save_every=500, keep=1),
    watching=Watching(eval_every=250, eval_batches=8, errors_every=0), compute=Compute(device=Device.CUDA),
)  # fmt: skip


def check(losses: dict[str, list[float]]) -> list[Check]:
    """C8 and 3.6c at this scale, from the final validation losses by seed; a run that diverged has none."""
    base = statistics.fmean(losses["bf16"])
    spread = [statistics.stdev(losses[arm]) for arm in ("bf16", "adam8bit")]
    noise = 2 * math.sqrt(sum(s * s for s in spread) / len(losses["bf16"]))
    gap = {arm: statistics.fmean(found) - base if found else math.inf for arm, found in losses.items()}
    seeds = ", ".join(f"{arm} {' '.join(f'{loss:.4f}' for loss in found)}" for arm, found in losses.items())
    return [
        Check("C8", "8 bits within seed noise of 32 bits (two standard errors of the difference)",
              f"gap {gap['adam8bit']:+.4f}, noise {noise:.4f}; {seeds}", abs(gap["adam8bit"]) <= noise),
        Check("3.6c", "linear 8 bits diverge, or are at least 0.1 worse", f"gap {gap['adam8bit_linear']:+.4f}",
              len(losses["adam8bit_linear"]) < len(losses["bf16"]) or gap["adam8bit_linear"] >= 0.1),
    ]  # fmt: skip


def report(summary: Summary, out: Path, run: Run) -> Path:
    """Write the results file, which tells where the runs were made."""
    told = json.loads((out / "bf16" / f"seed-{SEEDS[0]}" / "env.json").read_text(encoding="utf-8"))
    arms = {arm.name: arm for arm in summary.arms}
    losses = {name: [loss for loss in arm.loss_on.values if math.isfinite(loss)] for name, arm in arms.items()}
    content = {
        "run": run.resolved(), "losses": losses, "status": {name: arm.status for name, arm in arms.items()},
    }  # fmt: skip
    return write("eightbit_lm_gpu", told, content, check(losses))


def main(data: str, out: Path, jobs: int | None, as_is: bool) -> Path:
    """Train what is not there yet and report."""
    run = replace(RUN, data=data)
    return report(summarize(out) if as_is else compare(ARMS, SEEDS, run, out, jobs=jobs), out, run)
