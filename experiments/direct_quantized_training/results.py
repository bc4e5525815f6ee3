# SPDX-License-Identifier: Apache-2.0
"""Runs that are not repeated, claims, and results files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from experiments import checks as checks_file
from experiments.checks import Check
from lowbits.analysis import provenance


def once(out: Path, name: str, run: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Carry out a run that has no file in `out` yet, and return what it found."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name.replace(' ', '_')}.json"
    if not path.exists():
        result = run()
        path.write_text(json.dumps(result) + "\n", encoding="utf-8")
        print(f"{name}: {result}", flush=True)
    return json.loads(path.read_text(encoding="utf-8"))


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def spread(values: Sequence[float]) -> float:
    """The standard deviation over seeds."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def write(
    name: str, content: dict[str, object], checks: Sequence[Check], device: torch.device, folder: str | None = None
) -> Path:
    """Write benchmarks/results/<device>/dqt_<name>.json and print the claims; `folder`: measured on another device."""
    told = provenance(device)
    return checks_file.write(f"dqt_{name}", told | {"device": folder or told["device"]}, content, checks)
