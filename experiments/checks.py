# SPDX-License-Identifier: Apache-2.0
"""What the experiments share: a claim with what was measured of it, and the file that says so."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@dataclass(frozen=True)
class Check:
    """What should hold, what was measured, and whether it holds."""

    id: str
    statement: str
    measured: str
    holds: bool


def save(
    name: str,
    provenance: Mapping[str, Any],
    content: Mapping[str, Any],
    checks: Sequence[Check],
    results: Path = RESULTS,
) -> Path:
    """Write <results>/<device>/<name>.json.

    Args:
        name: of the file.
        provenance: where the numbers come from, see `lowbits.analysis.provenance`.
        content: what else the file says.
        checks: the claims, in the order of the file.
        results: folder of all devices.
    """
    path = results / str(provenance["device"]) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"provenance": provenance, **content, "checks": [asdict(check) for check in checks]}
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return path


def tell(path: Path, checks: Sequence[Check]) -> None:
    """Print the claims and where they stand."""
    for check in checks:
        print(f"{'holds ' if check.holds else 'FAILS '} {check.id:4} {check.statement}: {check.measured}")
    print(f"wrote {path}", flush=True)


def write(name: str, provenance: Mapping[str, Any], content: Mapping[str, Any], checks: Sequence[Check]) -> Path:
    """Write benchmarks/results/<device>/<name>.json and print the claims; see `save`."""
    path = save(name, provenance, content, checks)
    tell(path, checks)
    return path
