# SPDX-License-Identifier: Apache-2.0
"""Runs that are not repeated, claims, and results files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments import checks as checks_file
from experiments.checks import Check
from lowbits.analysis import provenance

Claims = Callable[[dict[str, Any]], Sequence[Check]]


def once(out: Path, name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Carry out a run that has no file in `out` yet, and return what it found."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name.replace(' ', '_')}.json"
    if not path.exists():
        result = run()
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(result) + "\n", encoding="utf-8")
        partial.replace(path)
        print(f"{name}: {result.get('result', result)}", flush=True)
    return json.loads(path.read_text(encoding="utf-8"))


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def spread(values: Sequence[float]) -> float:
    """The standard deviation over seeds."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def write(name: str, content: Mapping[str, object], checks: Sequence[Check], device: torch.device) -> Path:
    """Write benchmarks/results/<device>/dqt_<name>.json and print the claims."""
    return checks_file.write(f"dqt_{name}", provenance(device), content, checks)


class Ways:
    """A results file that grows by an entry as soon as one is measured, over several calls.

    Args:
        name: the file is `results`/<device>/dqt_<name>.json.
        setting: what else the file says; entries of another setting are dropped.
        claims: what is checked of all entries.
        device: measured on.
        results: folder of all devices.
    """

    def __init__(
        self, name: str, setting: Mapping[str, Any], claims: Claims, device: torch.device, results: Path
    ) -> None:
        self.name, self.setting, self.claims, self.results = name, dict(setting), claims, results
        self.told = provenance(device)
        path = results / str(self.told["device"]) / f"dqt_{name}.json"
        held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        same = held.get("setting") == json.loads(json.dumps(self.setting))
        self.ways: dict[str, Any] = held["ways"] if same else {}

    def add(self, name: str, found: Mapping[str, Any]) -> None:
        """Write an entry at once."""
        self.ways[name] = dict(found)
        self._save()

    def tell(self) -> None:
        """Print the claims, once all is there."""
        checks_file.tell(self._save(), self.claims(self.ways))

    def _save(self) -> Path:
        content = {"setting": self.setting, "ways": self.ways}
        return checks_file.save(f"dqt_{self.name}", self.told, content, self.claims(self.ways), self.results)
