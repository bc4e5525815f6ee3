# SPDX-License-Identifier: Apache-2.0
"""The table of optimizer steps in docs/optimizers.md, for `docs/generate.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "nvidia-h200" / "optimizer_step.json"


def optimizer_steps() -> str:
    """Every optimizer: milliseconds of a step by workload, their ratio to torch's fused AdamW, bytes of state."""
    workloads: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))["workloads"]
    rows = {title.split(":")[0]: {row["name"]: row for row in found["rows"]} for title, found in workloads.items()}
    names = list(dict.fromkeys(name for found in rows.values() for name in found))
    header = ["", *(f"{title}, ms (x torch fused)" for title in rows), "state bytes a parameter", "launches"]
    lines = [header, ["---"] * len(header)]
    for name in names:
        known = [found.get(name) for found in rows.values()]
        first = next(row for row in known if row)
        times = [f"{row['ms']:.2f} ({row['over_torch_fused']:.2f})" if row else "-" for row in known]
        size = f"{first['state_bytes_per_parameter']:.2f}" if first["state_bytes_per_parameter"] else "-"
        lines.append([name, *times, size, str(first["kernels"])])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


TABLES: dict[str, Callable[[], str]] = {"optimizer steps": optimizer_steps}
