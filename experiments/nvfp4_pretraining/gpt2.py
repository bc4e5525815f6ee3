# SPDX-License-Identifier: Apache-2.0
"""GPT-2 small on real text in bf16 and in 4 bits: what the recipe costs in loss, part by part (checks G3 and G7).

    python -m experiments.nvfp4_pretraining.gpt2 --data TOKENS --out runs/nvfp4-gpu
    python -m experiments.nvfp4_pretraining.gpt2 --data TOKENS --out runs/nvfp4-gpu --as-is    # report what is there

TOKENS is a folder made by `lowbits data prepare` with GPT-2's vocabulary. Through `lowbits compare`: resumable, all
GPUs used. After that one run of 50 steps is made twice, and both must have the same losses bit for bit. Writes
benchmarks/results/<device>/nvfp4_pretraining.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lowbits.study import Summary, compare, summarize
from lowbits.train import Compute, Device, Optimizer, Run, Saving, Watching, train

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SEEDS = (0, 1, 2)
SWITCHED = "nvfp4+80%:forward=off"
ARMS = ["bf16", "nvfp4", "nvfp4+keep.last=0.15", SWITCHED, "nvfp4_sr_forward", "mxfp4", "nvfp4_naive"]
RUN = Run(
    model="gpt2-small", steps=1500, batch_size=8, block=1024, optimizer=Optimizer(lr=6e-4, betas=(0.9, 0.95)),
    saving=Saving(save_every=100_000, keep=1),
    watching=Watching(log_every=50, eval_every=300, eval_batches=16, errors_every=0),
    compute=Compute(device=Device.CUDA, compile=True),
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """What should hold, what was measured, and whether it holds."""

    id: str
    statement: str
    measured: str
    holds: bool


def twice(run: Run, out: Path) -> Check:
    """G3: the same 50 steps twice, eager, every loss compared as it was written to the log."""
    short = replace(
        run, recipe="nvfp4", steps=50, compute=replace(run.compute, compile=False),
        watching=replace(run.watching, log_every=1, eval_every=50, eval_batches=1),
    )  # fmt: skip
    logs = []
    for name in ("first", "second"):
        train(short, out / "twice" / name, resume=True)
        lines = [json.loads(line) for line in (out / "twice" / name / "log.jsonl").read_text().splitlines()]
        logs.append([(line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "step"])
    same = sum(a == b for a, b in zip(*logs, strict=True))
    return Check("G3", "50 steps twice, same losses and gradient norms", f"{same} of {len(logs[0])} steps", same == 50)


def judge(losses: dict[str, list[float]], seeds: int) -> list[Check]:
    """G7 from the final validation losses by seed; a run that diverged has none."""

    def gap(arm: str) -> float:
        found = losses[arm]
        return statistics.fmean(found) - base if len(found) == seeds else math.inf

    base = statistics.fmean(losses["bf16"])
    gaps = {arm: gap(arm) for arm in ARMS}
    recovered = 1 - gaps[SWITCHED] / gaps["nvfp4"]
    worst = max((arm for arm in ARMS if arm != "nvfp4_sr_forward"), key=gaps.__getitem__)
    return [
        Check("G7a", "NVFP4 at most 2.5 % above bf16", f"{gaps['nvfp4'] / base:+.2%}", gaps["nvfp4"] <= 0.025 * base),
        Check("G7b", "stochastic rounding of forward tensors is the worst, or diverges",
              f"{gaps['nvfp4_sr_forward']:+.4f}; the worst of the others is {worst}, {gaps[worst]:+.4f}",
              gaps["nvfp4_sr_forward"] > gaps[worst]),
        Check("G7c", "MXFP4's gap is larger than NVFP4's", f"{gaps['mxfp4']:+.4f} against {gaps['nvfp4']:+.4f}",
              gaps["mxfp4"] > gaps["nvfp4"]),
        Check("G7d", "the forward switch at 80 % recovers at least half of the gap",
              f"{recovered:.0%}: {gaps[SWITCHED]:+.4f} of {gaps['nvfp4']:+.4f}", recovered >= 0.5),
    ]  # fmt: skip


def curve(folder: Path) -> list[tuple[int, float | None]]:
    """Tokens and validation loss at every evaluation of a run."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["tokens"], line["loss_on"]) for line in lines if line["kind"] == "eval"]


def report(summary: Summary, out: Path, run: Run, checks: Sequence[Check]) -> Path:
    """Write the results file, which tells where the runs were made."""
    told = json.loads(next(iter(sorted(out.glob("bf16/seed-*/env.json")))).read_text(encoding="utf-8"))
    losses = {arm.name: [x for x in arm.loss_on.values if math.isfinite(x)] for arm in summary.arms}
    checks = [*checks, *judge(losses, len(losses["bf16"]))]
    content = {
        "provenance": told, "run": run.resolved(), "losses": losses,
        "curves": {arm.name: {str(r.seed): curve(Path(r.directory)) for r in arm.runs} for arm in summary.arms},
        "status": {arm.name: arm.status for arm in summary.arms}, "checks": [asdict(c) for c in checks],
    }  # fmt: skip
    path = RESULTS / told["device"] / "nvfp4_pretraining.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for c in checks:
        print(f"{'holds ' if c.holds else 'FAILS '} {c.id:4} {c.statement}: {c.measured}")
    print(f"wrote {path}")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/nvfp4-gpu"))
    parser.add_argument("--steps", type=int, default=RUN.steps)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--model", default=RUN.model)
    parser.add_argument("--device", type=Device, default=Device.CUDA)
    parser.add_argument("--as-is", action="store_true", help="train nothing")
    chosen = parser.parse_args()
    compute = replace(RUN.compute, device=chosen.device, compile=chosen.device is not Device.CPU)
    run = replace(RUN, data=chosen.data, steps=chosen.steps, model=chosen.model, compute=compute)
    if chosen.as_is:
        found = summarize(chosen.out)
    else:
        found = compare(ARMS, range(chosen.seeds), run, chosen.out, jobs=chosen.jobs)
    report(found, chosen.out, run, [twice(run, chosen.out)])


if __name__ == "__main__":
    main()
