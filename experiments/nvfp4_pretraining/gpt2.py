# SPDX-License-Identifier: Apache-2.0
"""GPT-2 small on real text in bf16 and in 4 bits: what the recipe costs in loss, part by part (checks G3 and G7).

    python -m experiments.nvfp4_pretraining.gpt2 --data TOKENS --out runs/nvfp4-gpu
    python -m experiments.nvfp4_pretraining.gpt2 --data TOKENS --out runs/nvfp4-switch --name nvfp4_switch \\
        --steps 500 --arms bf16 nvfp4 nvfp4+80%:forward=off
    python -m experiments.nvfp4_pretraining.gpt2 --data TOKENS --out runs/nvfp4-gpu --as-is    # report what is there

TOKENS is a folder made by `lowbits data prepare` with GPT-2's vocabulary. Through `lowbits compare`: resumable, all
GPUs used. Arms are compared at the last step at which every run was evaluated. Writes
benchmarks/results/<device>/<name>.json. After that one run of 50 steps is made twice, both must have the same losses
bit for bit, and the file is written again with what came of it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

from experiments.checks import Check, write
from lowbits.study import Summary, compare, summarize
from lowbits.train import Compute, Device, Optimizer, Run, Saving, Watching, train

SWITCHED = "nvfp4+80%:forward=off"
REPEATED = 50
ARMS = ["bf16", "nvfp4", "nvfp4+keep.last=0.15", SWITCHED, "nvfp4_sr_forward", "mxfp4", "nvfp4_naive"]
RUN = Run(
    model="gpt2-small", steps=1500, batch_size=8, block=1024, optimizer=Optimizer(lr=6e-4, betas=(0.9, 0.95)),
    saving=Saving(save_every=100_000, keep=1),
    watching=Watching(log_every=50, eval_every=300, eval_batches=16, errors_every=0),
    compute=Compute(device=Device.CUDA, compile=True),
)  # fmt: skip


def twice(run: Run, out: Path) -> Check:
    """G3: the same 50 steps twice, eager and deterministic, every loss compared as it was written to the log.

    A run that was stopped on the way has fewer lines: the check does not hold and says so, and nothing more is trained.
    """
    short = replace(
        run, recipe="nvfp4", steps=REPEATED, compute=replace(run.compute, compile=False, deterministic=True),
        watching=replace(run.watching, log_every=1, eval_every=REPEATED, eval_batches=1),
    )  # fmt: skip
    statement, logs = f"{REPEATED} steps twice, same losses and gradient norms", []
    for name in ("first", "second"):
        train(short, out / "twice" / name, resume=True)
        lines = [json.loads(line) for line in (out / "twice" / name / "log.jsonl").read_text().splitlines()]
        logs.append([(line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "step"])
        if len(logs[-1]) != REPEATED:
            return Check(
                "G3", statement, f"not measured: the {name} run has {len(logs[-1])} of {REPEATED} steps", False
            )
    same = sum(a == b for a, b in zip(*logs, strict=True))
    return Check("G3", statement, f"{same} of {REPEATED} steps", same == REPEATED)


def judge(losses: dict[str, list[float]], switched: bool) -> list[Check]:
    """G7 from validation losses by seed, as far as its arms are there; a run that diverged has none."""
    base, seeds = statistics.fmean(losses["bf16"]), len(losses["bf16"])
    gaps = {arm: statistics.fmean(x) - base if len(x) == seeds else math.inf for arm, x in losses.items()}
    checks = [
        Check("G7a", "NVFP4 at most 2.5 % above bf16", f"{gaps['nvfp4'] / base:+.2%}", gaps["nvfp4"] <= 0.025 * base)
    ]
    others = {arm: gap for arm, gap in gaps.items() if arm != "nvfp4_sr_forward"}
    worst = max(others, key=others.__getitem__)
    if "nvfp4_sr_forward" in gaps:
        checks.append(
            Check("G7b", "stochastic rounding of forward tensors is the worst, or diverges",
                  f"{gaps['nvfp4_sr_forward']:+.4f}; the worst of the others is {worst}, {gaps[worst]:+.4f}",
                  gaps["nvfp4_sr_forward"] > gaps[worst])
        )  # fmt: skip
    if "mxfp4" in gaps:
        checks.append(
            Check("G7c", "MXFP4's gap is larger than NVFP4's", f"{gaps['mxfp4']:+.4f} against {gaps['nvfp4']:+.4f}",
                  gaps["mxfp4"] > gaps["nvfp4"])
        )  # fmt: skip
    if switched:
        checks.append(judge_switch(gaps, standard_error(losses["bf16"], losses["nvfp4"])))
    return checks


def judge_switch(gaps: dict[str, float], error: float) -> Check:
    """G7d: where there is a gap, at least two standard errors wide; of what is not there nothing can be recovered."""
    statement = "the forward switch at 80 % recovers at least half of the gap"
    left = f"{gaps[SWITCHED]:+.4f} is left of {gaps['nvfp4']:+.4f}"
    if not gaps["nvfp4"] > 2 * error:
        return Check("G7d", statement, f"not resolvable: {left}, which is no gap (standard error {error:.4f})", False)
    recovered = 1 - gaps[SWITCHED] / gaps["nvfp4"]
    return Check("G7d", statement, f"{recovered:.0%}: {left}", recovered >= 0.5)


def standard_error(*samples: list[float]) -> float:
    """Standard error of the difference of two means; infinite where a sample has one number."""
    if min(map(len, samples)) < 2:
        return math.inf
    return math.sqrt(sum(statistics.variance(sample) / len(sample) for sample in samples))


def curve(folder: Path) -> dict[int, float | None]:
    """Validation loss by step, at every evaluation of a run."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line["loss_on"] for line in lines if line["kind"] == "eval"}


def report(summary: Summary, out: Path, name: str, repeated: list[Check]) -> Path:
    """Write the results file, which tells where the runs were made."""
    told = json.loads(next(iter(sorted(out.glob("bf16/seed-*/env.json")))).read_text(encoding="utf-8"))
    run = json.loads(next(iter(sorted(out.glob("bf16/seed-*/config.json")))).read_text(encoding="utf-8"))
    curves = {arm.name: {str(r.seed): curve(out / r.directory) for r in arm.runs} for arm in summary.arms}
    ended = {arm: all(r.status != "diverged" for r in a.runs) for arm, a in zip(curves, summary.arms, strict=True)}
    step = min(max(c) for arm, found in curves.items() if ended[arm] for c in found.values() if c)
    losses = {arm: [x for c in found.values() if (x := c.get(step)) is not None] for arm, found in curves.items()}
    checks = [*repeated, *judge(losses, SWITCHED in losses and step > 0.8 * run["steps"])]
    content = {
        "run": run, "compared_at_step": step, "losses": losses, "curves": curves,
        "status": {arm.name: arm.status for arm in summary.arms},
    }  # fmt: skip
    return write(name, told, content, checks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/nvfp4-gpu"))
    parser.add_argument("--name", default="nvfp4_pretraining", help="of the results file")
    parser.add_argument("--arms", nargs="+", default=ARMS, help="bf16 and nvfp4 are among them")
    parser.add_argument("--steps", type=int, default=RUN.steps)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--model", default=RUN.model)
    parser.add_argument("--device", type=Device, default=Device.CUDA)
    parser.add_argument("--as-is", action="store_true", help="train nothing")
    chosen = parser.parse_args()
    compute = replace(RUN.compute, device=chosen.device, compile=chosen.device is not Device.CPU)
    watching = replace(RUN.watching, eval_every=min(RUN.watching.eval_every, max(chosen.steps // 5, 1)))
    run = replace(RUN, data=chosen.data, steps=chosen.steps, model=chosen.model, compute=compute, watching=watching)
    if chosen.as_is:
        report(summarize(chosen.out), chosen.out, chosen.name, [])
        return
    found = compare(chosen.arms, range(chosen.seeds), run, chosen.out, jobs=chosen.jobs)
    report(found, chosen.out, chosen.name, [])  # before anything can stop what follows
    report(found, chosen.out, chosen.name, [twice(run, chosen.out)])


if __name__ == "__main__":
    main()
