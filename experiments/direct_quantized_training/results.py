# SPDX-License-Identifier: Apache-2.0
"""Runs that are not repeated, claims, and results files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lowbits.analysis import device_name, provenance

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@dataclass(frozen=True)
class Check:
    """What should hold, what was measured, and whether it holds."""

    id: str
    statement: str
    measured: str
    holds: bool


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
    path = RESULTS / (folder or device_name(device)) / f"dqt_{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"provenance": provenance(device), **content, "checks": [asdict(check) for check in checks]}
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    for check in checks:
        print(f"{'holds ' if check.holds else 'FAILS '} {check.id:4} {check.statement}: {check.measured}")
    print(f"wrote {path}")
    return path
