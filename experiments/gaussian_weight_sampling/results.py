# SPDX-License-Identifier: Apache-2.0
"""Results files of these experiments."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from experiments.eightbit_optimizers.runs import RESULTS, Check
from lowbits.analysis import device_name, provenance


def write(name: str, content: dict[str, object], checks: Sequence[Check], device: torch.device) -> Path:
    """Write benchmarks/results/<device>/gaussws_<name>.json and print the claims."""
    path = RESULTS / device_name(device) / f"gaussws_{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"provenance": provenance(device), **content, "checks": [asdict(check) for check in checks]}
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    for check in checks:
        print(f"{'holds ' if check.holds else 'FAILS '} {check.id:4} {check.statement}: {check.measured}")
    print(f"wrote {path}")
    return path
