# SPDX-License-Identifier: Apache-2.0
"""Tables of docs/papers/nvfp4.md and docs/analysis.md, from results files; `docs/generate.py` writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def found(path: str) -> dict[str, Any]:
    return json.loads((RESULTS / path).read_text(encoding="utf-8"))


def checks() -> str:
    """Every claim that was checked on the H200; the longer runs speak where the shorter ones do too."""
    said = {c["id"]: c for name in ("switch", "pretraining") for c in found(f"nvidia-h200/nvfp4_{name}.json")["checks"]}
    rows = (
        [name, c["statement"], c["measured"], "yes" if c["holds"] else "**no**"] for name, c in sorted(said.items())
    )
    return table(["check", "claim", "measured, gaps in nats", "holds"], rows)


def arms(name: str) -> str:
    """Every arm: validation losses by seed where all were evaluated last, and the mean gap to bf16."""
    path = f"nvidia-h200/{name}.json"
    told = found(path)
    base = fmean(told["losses"]["bf16"])
    by_gap = sorted(told["losses"].items(), key=lambda item: fmean(item[1]))
    rows = (
        [
            f"`{arm}`",
            " ".join(f"{x:.4f}" for x in losses),
            f"{fmean(losses) - base:+.4f}",
            f"{fmean(losses) / base - 1:+.2%}",
        ]
        for arm, losses in by_gap
    )
    run, where = told["run"], told["provenance"]
    tokens = told["compared_at_step"] * run["batch_size"] * run["block"]
    origin = (
        f"{where['device']}, torch {where['versions']['torch']}; {run['model']}, step {told['compared_at_step']} of a "
        f"schedule of {run['steps']}, {tokens / 1e6:.1f}M tokens; file: "
        f"`benchmarks/results/{path}`.\n"
    )
    return table(["arm", "validation loss by seed", "gap, nats", "relative"], rows) + "\n" + origin


def fixed() -> str:
    """The fixed-checkpoint probe: rise of the loss over NVFP4's, and errors of the gradient."""
    told = found("cpu-x86_64/nvfp4_fixed_checkpoint.json")
    runs = [(text, run) for text, seeds in told["texts"].items() for run in seeds]
    names = list(runs[0][1]["rise_over_nvfp4"])
    header = ["rise of the loss, over NVFP4's", *(f"{text}, seed {run['seed']}" for text, run in runs)]
    return table(header, ([f"`{name}`", *(f"{run['rise_over_nvfp4'][name]:.2f}" for _, run in runs)] for name in names))


def gradients() -> str:
    """Relative errors of the gradient at a fixed checkpoint: of a single draw, and of the mean of all draws."""
    told = found("cpu-x86_64/nvfp4_fixed_checkpoint.json")
    runs = [(text, run) for text, seeds in told["texts"].items() for run in seeds]
    names = list(runs[0][1]["gradient_error"])
    header = ["error of the gradient: one draw, mean of 24", *(f"{text}, seed {run['seed']}" for text, run in runs)]

    def words(error: dict[str, float]) -> str:
        single, mean = error["single"], error["mean"]
        return f"{single:.3f}" if abs(single - mean) < 5e-4 else f"{single:.3f}, {mean:.3f}"

    return table(header, ([name, *(words(run["gradient_error"][name]) for _, run in runs)] for name in names))


def telemetry() -> str:
    """What sampling every 100 steps costs, on every device that has a results file."""
    rows = []
    for path in sorted(RESULTS.glob("*/telemetry.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        where = [path.parent.name, told["shape"]["model"]]
        rows += [
            [*where, name, f"{r['step_ms']:.0f}", f"{r['sampled_step_ms']:.0f}", f"{r['share_of_training_time']:.2%}",
             told["provenance"]["commit"]]
            for name, r in told["recipes"].items()
        ]  # fmt: skip
    header = ["device", "model", "recipe", "step, ms", "sampled step, ms", "of training time", "commit"]
    return table(header, rows)


TABLES: dict[str, Callable[[], str]] = {
    "nvfp4 checks": checks, "nvfp4 arms": partial(arms, "nvfp4_pretraining"),
    "nvfp4 switch": partial(arms, "nvfp4_switch"), "nvfp4 fixed": fixed, "nvfp4 gradients": gradients,
    "telemetry": telemetry,
}  # fmt: skip
