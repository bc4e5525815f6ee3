# SPDX-License-Identifier: Apache-2.0
"""Runs that are not repeated, claims, and results files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from experiments import checks as checks_file
from experiments.checks import Check
from experiments.geta.arms import Arm, Result, Task, measured
from lowbits.analysis import provenance

SEEDS = (0, 1, 2)


def each(out: Path, task: Task, arms: Mapping[str, Arm], seeds: Sequence[int] = SEEDS) -> dict[str, list[Result]]:
    """Carry out every run that has no file in `out` yet; all arms of a seed before any of the next."""
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Result]] = {name: [] for name in arms}
    for seed in seeds:
        for name, arm in arms.items():
            path = out / f"{task.name}-{name.replace(' ', '_').replace(',', '').replace('%', 'pc')}-{seed}.json"
            if not path.exists():
                path.write_text(json.dumps(measured(task, arm, seed)) + "\n", encoding="utf-8")
                print(f"{task.name}, {name}, seed {seed}: {path.read_text(encoding='utf-8').strip()}", flush=True)
            found[name].append(json.loads(path.read_text(encoding="utf-8")))
    return found


def mean(runs: Mapping[str, list[Result]], name: str, key: str) -> float:
    """Return the mean over seeds."""
    return sum(float(result[key]) for result in runs[name]) / len(runs[name])


def told(runs: Mapping[str, list[Result]], name: str, key: str) -> str:
    """Return the numbers of an arm by seed."""
    return " ".join(f"{result[key]:.4g}" for result in runs[name])


def write(name: str, content: dict[str, object], checks: Sequence[Check], device: torch.device) -> Path:
    """Write benchmarks/results/<device>/geta_<name>.json and print the claims."""
    return checks_file.write(f"geta_{name}", provenance(device), content, checks)
