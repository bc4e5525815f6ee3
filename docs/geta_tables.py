# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/papers/geta.md, from the results files of its experiments."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
WHERE = {
    "image_cpu": "images, CPU", "image_longer_cpu": "images, CPU", "text_cpu": "text, CPU",
    "language_cpu": "characters, CPU", "graph": "tracing", "overhead": "step time", "resnet": "ResNet-20, H200",
    "llama": "Llama, H200",
}  # fmt: skip
ABSENT = "Not measured yet.\n"


def found(name: str) -> list[dict[str, Any]]:
    """The results files of an experiment, one a device."""
    return [
        {**json.loads(file.read_text(encoding="utf-8")), "path": f"benchmarks/results/{file.parent.name}/{file.name}"}
        for file in sorted(RESULTS.glob(f"*/geta_{name}.json"))
    ]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def origin(told: dict[str, Any]) -> str:
    """Where a results file comes from."""
    made = told["provenance"]
    return f"{made['device']}, torch {made['versions']['torch']}; file: `{told['path']}`."


def checks() -> str:
    """Every claim that was checked."""
    rows = [
        [f"{where}, {told['provenance']['device']}" if name == "overhead" else where, c["id"], c["statement"],
         c["measured"], "yes" if c["holds"] else "**no**"]
        for name, where in WHERE.items() for told in found(name) for c in told["checks"]
    ]  # fmt: skip
    return table(["where", "check", "claim", "measured", "holds"], rows) if rows else ABSENT


def arms(name: str, key: str) -> str:
    """Every arm: what was measured by seed, BOPs and bytes over the dense network's in 32 bits."""
    told = next(iter(found(name)), None)
    if told is None:
        return ABSENT
    rows = []
    for arm, runs in told["runs"].items():
        values = [run[key] for run in runs]
        shown = " ".join(f"{value:.2f}" if key == "accuracy" else f"{value:.3f}" for value in values)
        middle = f"{fmean(values):.2f}" if key == "accuracy" else f"{fmean(values):.3f}"
        share = [f"{100 * fmean(run[k] for run in runs):.2f}" for k in
                 ("relative_bops", "relative_complete_bops", "relative_bytes")]  # fmt: skip
        bits = f"{fmean(run['mean_bits'] for run in runs):.2f}"
        rows.append([arm, shown, middle, f"{runs[0]['pruned']} of {runs[0]['units']}", bits, *share])
    header = [
        "arm",
        f"{key} by seed",
        "mean",
        "units gone",
        "mean bits",
        "BOPs, %",
        "BOPs with attention, %",
        "bytes, %",
    ]
    setting = told["setting"]
    words = "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in setting.items())
    words += "" if told.get("complete", True) else "; **not all runs are done**"
    return f"{table(header, rows)}\n{words}. {origin(told)}\n"


def tracing() -> str:
    """Time to find the dependency graph."""
    told = next(iter(found("graph")), None)
    if told is None:
        return ABSENT
    rows = [[f"`{r['model']}`", f"{r['parameters']:,}", str(r["dimensions"]), f"{r['units']:,}", f"{r['seconds']:.1f}"]
            for r in told["rows"]]  # fmt: skip
    return f"{table(['model', 'parameters', 'dimensions', 'units', 'seconds'], rows)}\n{origin(told)}\n"


def overhead() -> str:
    """Time of a step in the joint stage, and of a plain one."""
    told = found("overhead")
    if not told:
        return ABSENT
    keys = ("plain_ms", "joint_ms", "ratio", "optimizer_ms", "joint_optimizer_ms", "choosing_ms")
    rows = [
        [f["provenance"]["device"], r["model"], *(f"{r[key]:.2f}" for key in keys)] for f in told for r in f["rows"]
    ]
    header = ["device", "network", "plain, ms", "joint, ms", "ratio", "optimizer's part, ms", "joint optimizer's, ms",
              "step that chooses units, ms"]  # fmt: skip
    return f"{table(header, rows)}\n{' '.join(origin(f) for f in told)}\n"


TABLES: dict[str, Callable[[], str]] = {
    "geta checks": checks,
    "geta images": partial(arms, "image_cpu", "accuracy"),
    "geta texts": partial(arms, "text_cpu", "accuracy"),
    "geta characters": partial(arms, "language_cpu", "loss"),
    "geta resnet": partial(arms, "resnet", "accuracy"),
    "geta llama": partial(arms, "llama", "loss"),
    "geta tracing": tracing,
    "geta overhead": overhead,
}
