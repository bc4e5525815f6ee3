# SPDX-License-Identifier: Apache-2.0
"""What the experiments share: runs that are not repeated, claims, and results files."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from experiments import checks as checks_file
from experiments.checks import Check
from lowbits.analysis import provenance

SEEDS = (0, 1, 2)
Result = dict[str, float]
Runs = dict[str, list[Result]]


def each(out: Path, names: Sequence[str], run: Callable[[str, int], Result], seeds: Sequence[int] = SEEDS) -> Runs:
    """Carry out every run that has no file in `out` yet; all arms of a seed before any of the next."""
    out.mkdir(parents=True, exist_ok=True)
    found: Runs = {name: [] for name in names}
    for seed in seeds:
        for name in names:
            path = out / f"{name.replace(' ', '_')}-{seed}.json"
            if not path.exists():
                begun = time.perf_counter()
                result = run(name, seed) | {"seconds": round(time.perf_counter() - begun, 1)}
                path.write_text(json.dumps(result) + "\n", encoding="utf-8")
                print(f"{name} seed {seed}: {result}", flush=True)
            found[name].append(json.loads(path.read_text(encoding="utf-8")))
    return found


def column(runs: Runs, name: str, key: str) -> list[float]:
    """Return one number of an arm, by seed; NaN where the run left the range of numbers."""
    return [float(result[key]) for result in runs[name]]


def gaps(runs: Runs, name: str, baseline: str, key: str) -> list[float]:
    """Return an arm minus the baseline, seed by seed: both began at the same weights and read the same data."""
    return [a - b for a, b in zip(column(runs, name, key), column(runs, baseline, key), strict=True)]


def mean_gap(runs: Runs, name: str, baseline: str, key: str) -> float:
    """Return the mean of `gaps`; a run that diverged counts as infinitely bad."""
    return statistics.fmean(math.inf if math.isnan(gap) else gap for gap in gaps(runs, name, baseline, key))


def told(runs: Runs, name: str, baseline: str, key: str) -> str:
    """Return an arm's gaps in words."""
    found = gaps(runs, name, baseline, key)
    return f"{name} {' '.join(f'{gap:+.4f}' if abs(gap) < 10 else f'{gap:+.0f}' for gap in found)}"


def write(name: str, content: dict[str, object], checks: Sequence[Check], device: torch.device) -> Path:
    """Write benchmarks/results/<device>/eightbit_<name>.json and print the claims."""
    return checks_file.write(f"eightbit_{name}", provenance(device), content, checks)
